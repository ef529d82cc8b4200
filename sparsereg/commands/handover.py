"""What test.py hands over: the compacted network, its file for deployment, its speed."""

import importlib.util
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsereg.compression import benchmark, compact, export, fuse, load_compacted, save_compacted
from sparsereg.data.own import RunData
from sparsereg.files import write_new
from sparsereg.layers import GatedLayer, save_csr
from sparsereg.layers.storage import Storage
from sparsereg.training.checkpoint import Checkpoint
from sparsereg.training.config import Evaluation, Training
from sparsereg.zoo import networks
from sparsereg.zoo.config import OwnNetwork


def run(
    given: Evaluation,
    cfg: Training,
    checkpoint: Checkpoint,
    net: nn.Module,
    example: Tensor,
    data: RunData,
    device: torch.device,
    folder: Path,
) -> dict[str, Any]:
    """Do what ``compact``, ``export`` and ``benchmark`` ask for and return what to add to results.json.

    Args:
        given: of test.py.
        cfg: of the checkpoint.
        checkpoint: what is tested.
        net: the gated (or plain) network, on the CPU.
        example: one image, (1, channels, height, width).
        data: with the test images.
        device: where to test.
        folder: of this test, for plots.
    """
    results: dict[str, Any] = {}
    beside = checkpoint.path.parent
    if given.compact:
        notes = {
            "config": checkpoint.config,
            "num_classes": checkpoint.num_classes,
            "image_shape": list(checkpoint.image_shape),
            "data": data.describe(),
            "checkpoint": str(checkpoint.path),
        }
        small = compact(net, example)
        path = write_new(beside / "compacted.pt", lambda p: save_compacted(small, p, notes))
        # What is tested is what the file holds.
        small = load_compacted(path).to(device)
        results["compacted"] = str(path)
        results["compacted_test_acc"] = accuracy(small, data.test_dataloader())
        print(f"compacted: {path}, test accuracy {results['compacted_test_acc']:.4f}")
        if any(isinstance(m, GatedLayer) and m.per_weight for m in net.modules()):
            results |= store_sparse(small, beside / "compacted.csr")
    if given.export:
        path = write_new(beside / f"compacted.{given.export}", lambda p: export(net, example, p))
        results["exported"] = str(path)
        print(f"exported: {path}")
    if given.benchmark:
        results["latency"] = time_networks(cfg, checkpoint, net, example, folder)
    return results


def store_sparse(net: nn.Module, path: Path) -> dict[str, Any]:
    """Write a network with zeros among its weights as compressed sparse rows; say what that saves.

    Returns:
        The file and its measured size, and the size of the dense tensors, for results.json.
    """
    measured: list[Storage] = []
    path = write_new(path, lambda beside: measured.append(save_csr(net, beside)))
    (storage,) = measured
    print(
        f"sparse rows: {path}, {storage.stored_bytes:,} bytes of {storage.dense_bytes:,} dense; "
        f"{storage.num_nonzero:,} of {storage.num_weights:,} weights are not zero (saves storage, not time)"
    )
    return {
        "csr": str(path),
        "csr_bytes": storage.stored_bytes,
        "dense_bytes": storage.dense_bytes,
        "nonzero_parameters": storage.num_nonzero,
    }


@torch.inference_mode()
def accuracy(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the share of images whose largest logit is that of their class.

    Args:
        net: in eval mode.
        batches: (images, labels), on any device.
    """
    right = total = 0
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    for images, labels in batches:
        right += int((net(images.to(device)).argmax(1) == labels.to(device)).sum())
        total += len(labels)
    return right / total


def time_networks(
    cfg: Training, checkpoint: Checkpoint, net: nn.Module, example: Tensor, folder: Path
) -> list[dict[str, Any]]:
    """Time the dense network, the gated one and the compacted one in turns; print a table, write a plot.

    Eager and compiled, and in onnxruntime where it is installed; batches of 1 and 128. The dense network
    is the one without gates, so that the cost of gates at test time shows, too.

    Returns:
        One row for each network, runtime and batch size.
    """
    networks_by_name: dict[str, nn.Module] = {"gated": net, "compacted": fuse(compact(net, example))}
    if checkpoint.gated and not isinstance(cfg.model, OwnNetwork):  # which may have no form without gates
        task = networks.Task(checkpoint.num_classes, checkpoint.image_shape)
        dense = networks.build(cfg.model, task, gated=False).eval()
        networks_by_name = {"dense": dense, **networks_by_name}
    runtimes = ["eager", "compiled"]
    if importlib.util.find_spec("onnxruntime"):
        runtimes.append("onnxruntime")
    latency = benchmark(networks_by_name, example, runtimes=runtimes, channels_last=cfg.trainer.channels_last)
    print(latency.table())
    print(f"plot: {latency.plot(folder / 'latency.png')}")
    return [asdict(row) for row in latency.rows]
