"""What test.py writes for deployment: the compacted network, its file, its speed."""

import importlib.util
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.utilities.apply_func import move_data_to_device
from torch import nn

from sparsereg.compression import benchmark, compact, export, fuse, load_compacted, save_compacted
from sparsereg.data.batches import call
from sparsereg.data.own import RunData
from sparsereg.files import write_new
from sparsereg.layers import GatedLayer, save_csr
from sparsereg.layers.storage import Storage
from sparsereg.training.checkpoint import Checkpoint
from sparsereg.training.config import Evaluation, Training
from sparsereg.training.results import as_written
from sparsereg.training.tasks.task import SHARES, Task
from sparsereg.zoo import networks
from sparsereg.zoo.kinds.own import OwnNetwork


def run(
    given: Evaluation,
    cfg: Training,
    checkpoint: Checkpoint,
    net: nn.Module,
    example: Any,
    data: RunData,
    task: Task,
    device: torch.device,
    folder: Path,
) -> dict[str, Any]:
    """Do what ``compact``, ``export`` and ``benchmark`` ask for and return what to add to results.json.

    Args:
        given: of test.py.
        cfg: of the checkpoint.
        checkpoint: what is tested.
        net: the gated (or plain) network, on the CPU.
        example: one example.
        data: with the test examples.
        task: what is measured.
        device: where to test.
        folder: of this test, for plots.
    """
    results: dict[str, Any] = {}
    beside = checkpoint.path.parent
    if given.compact:
        notes = {
            "config": checkpoint.config,
            **checkpoint.form.described(),
            "data": data.describe(),
            "checkpoint": str(checkpoint.path),
        }
        small = compact(net, example)
        path = write_new(beside / "compacted.pt", lambda p: save_compacted(small, p, notes))
        # What is tested is what the file holds.
        small = load_compacted(path).to(device)
        results["compacted"] = str(path)
        figures = measure(small, task, data.test_dataloader(), device)
        results |= {f"compacted_test_{name}": value for name, value in figures.items()}
        word = SHARES.get(task.figure, task.figure)
        print(f"compacted: {path}, test {word} {figures[task.figure]:.4f}")
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
def measure(net: nn.Module, task: Task, batches: Iterable[Any], device: torch.device) -> dict[str, float]:
    """Return the figures of a task.

    Args:
        net: in eval mode.
        task: that tells what is measured.
        batches: of test examples, on any device.
        device: of the network.
    """
    metrics = {name: metric.to(device) for name, metric in task.metrics().items()}
    for batch in batches:
        inputs, labels = task.split(move_data_to_device(batch, device))
        predictions, labels = task.predictions(call(net, inputs), labels)
        for metric in metrics.values():
            metric.update(predictions, labels)
    return {name: as_written(metric.compute()) for name, metric in metrics.items()}


def time_networks(
    cfg: Training, checkpoint: Checkpoint, net: nn.Module, example: Any, folder: Path
) -> list[dict[str, Any]]:
    """Time the dense network, the gated one and the compacted one in turns; print a table, write a plot.

    Eager and compiled, and in onnxruntime where it is installed; batches of 1 and 128. The dense network
    is the one without gates, so that the cost of gates at test time shows, too.

    Returns:
        One row for each network, runtime and batch size.
    """
    networks_by_name: dict[str, nn.Module] = {"gated": net, "compacted": fuse(compact(net, example))}
    if checkpoint.gated and not isinstance(cfg.model, OwnNetwork):  # which may have no form without gates
        dense = networks.build(cfg.model, checkpoint.form, gated=False).eval()
        networks_by_name = {"dense": dense, **networks_by_name}
    runtimes = ["eager", "compiled"]
    if importlib.util.find_spec("onnxruntime"):
        runtimes.append("onnxruntime")
    latency = benchmark(networks_by_name, example, runtimes=runtimes, channels_last=cfg.trainer.channels_last)
    print(latency.table())
    print(f"plot: {latency.plot(folder / 'latency.png')}")
    return [asdict(row) for row in latency.rows]
