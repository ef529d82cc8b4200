import builtins
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from sparsereg.compression import (
    compact,
    export,
    fuse,
    gate,
    load_compacted,
    save_compacted,
    shift_pools,
)
from sparsereg.compression import deploy as module
from sparsereg.compression.timing.runtimes import Loaders
from sparsereg.compression.verify import apart, difference
from sparsereg.errors import InputError
from tests.compression.networks import NETWORKS, make, set_gates

RUN = """
import sys
sys.modules["sparsereg"] = None
import numpy as np
x = np.load(sys.argv[2])
if sys.argv[1].endswith(".pt2"):
    import torch
    y = torch.export.load(sys.argv[1]).module()(torch.from_numpy(x)).detach().numpy()
else:
    import onnxruntime
    session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x})
np.save(sys.argv[3], y)
"""


@pytest.mark.costly
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_fresh_process_without_sparsereg_gives_the_same_answers(suffix, tmp_path):
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    network, _ = make("residual")
    set_gates(network, "mixed")
    path = export(network, torch.zeros(1, 3, 8, 8), tmp_path / f"n{suffix}")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    x = np.random.default_rng(0).normal(size=(7, 3, 8, 8)).astype("float32")
    np.save(tmp_path / "x.npy", x)
    files = [str(tmp_path / name) for name in (path.name, "x.npy", "y.npy")]
    subprocess.run([sys.executable, "-c", RUN, *files], check=True, capture_output=True)
    wanted = network(torch.from_numpy(x)).detach()
    assert difference(wanted, torch.from_numpy(np.load(tmp_path / "y.npy"))) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize(
    "name", ["googlenet", "resnet18", "mobilenet_v2", "functional", "lenet300", "grouped"]
)
def test_many_networks_are_exported(name, suffix, tmp_path):
    pytest.importorskip("onnxruntime")
    network, x = make(name)
    for pattern in ("mixed", "one open"):
        set_gates(network, pattern)
        export(network, x, tmp_path / f"n{suffix}")  # checks itself


@pytest.mark.costly
@pytest.mark.parametrize("name", NETWORKS)
def test_fusing_keeps_the_answers(name):
    network, x = make(name)
    set_gates(network, "mixed")
    smaller = compact(network, x, check=False)
    before = {k: v.clone() for k, v in smaller.state_dict().items()}
    fused = fuse(smaller)
    assert difference(smaller(x), fused(x)) < 1e-5
    assert all(torch.equal(v, before[k]) for k, v in smaller.state_dict().items())
    if name in ("googlenet", "resnet18", "mobilenet_v2"):
        assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())


@pytest.mark.costly
def test_shifted_maps_are_max_pooling(tmp_path):
    network, x = make("googlenet")
    set_gates(network, "mixed")
    smaller = compact(network, x, check=False)
    shifted = shift_pools(smaller)
    assert torch.equal(smaller(x), shifted(x))
    pools = [m for m in shifted.modules() if isinstance(m, nn.MaxPool2d)]
    assert len(pools) == 2  # the ones with stride 2
    loaded = load_compacted(save_compacted(shifted, tmp_path / "c.pt"))
    assert torch.equal(loaded(x), shifted(x))
    torch.manual_seed(0)
    odd = nn.Sequential(
        nn.MaxPool2d((5, 1), 1, (2, 0)), nn.MaxPool2d(3, 1), nn.MaxPool2d(3, 1, 1, dilation=1)
    )
    y = -torch.rand(2, 3, 9, 9)
    plain = compact(odd, y)
    assert torch.equal(plain(y), shift_pools(plain)(y))


def test_wrong_arguments_are_named(tmp_path, monkeypatch):
    network, x = make("mlp")
    with pytest.raises(ValueError, match=r"\.onnx or \.pt2 or \.xml"):
        export(network, x, tmp_path / "n.pt")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs the package onnx: pip install onnx onnxscript"):
        export(network, x, tmp_path / "n.onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_that_gives_other_answers_is_not_left_behind(tmp_path, monkeypatch):
    network, x = make("mlp")
    monkeypatch.setattr(
        module,
        "_WRITERS",
        {".pt2": ((), module._write_pt2, lambda path: module.File(lambda b: (torch.zeros(len(b), 10),), []))},
    )
    with pytest.raises(RuntimeError, match=r"n\.pt2 gives other answers"):
        export(network, x, tmp_path / "n.pt2")
    assert not list(tmp_path.iterdir())


def test_without_onnxruntime_the_file_is_not_checked_and_that_is_said(tmp_path, monkeypatch, caplog):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "onnxruntime":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert module._run_onnx(b"") is None
    assert "was not checked" in caplog.text


class Named(nn.Module):
    """Takes inputs by name, one of them a mask, and answers with a dictionary."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.last = nn.Linear(8, 4)

    def forward(self, x, mask):
        return {"logits": self.last(self.first(x).relu()) * mask.float(), "mask": mask}


@pytest.mark.costly
@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".xml"])
def test_inputs_by_name(suffix, tmp_path):
    pytest.importorskip("onnxruntime")
    if suffix == ".xml":
        pytest.importorskip("openvino")
    example = {"mask": torch.ones(1, 4, dtype=torch.int64), "x": torch.randn(1, 6)}
    network = gate(Named(), example)
    set_gates(network, "mixed")
    export(network, example, tmp_path / f"n{suffix}")  # checks itself, at two batch sizes


def test_openvino_is_two_files_that_go_together(tmp_path):
    pytest.importorskip("openvino")
    network, x = make("residual")
    set_gates(network, "mixed")
    path = export(network, x, tmp_path / "n.xml")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["n.bin", "n.xml"]
    loaded = Loaders(x, threads=1).load(path, "openvino")
    found = loaded.tensors(loaded.run(loaded.prepare(x)))
    assert difference(network(x).detach(), found[0]) < 1e-4


class Tones(nn.Module):
    """Sound of any length in four channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv1d(4, 6, 5, 2), nn.GRU(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.b(self.a(x).relu().transpose(1, 2))[0].mean(1))


@pytest.mark.costly
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_files_take_sequences_of_other_lengths(suffix, tmp_path):
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    network, x = Tones().eval(), torch.randn(1, 4, 60)
    file = module._WRITERS[suffix][2](export(network, x, tmp_path / f"n{suffix}"))
    assert [isinstance(size, str) for size in file.shapes[0]] == [True, False, True]
    if suffix == ".onnx":
        assert file.shapes == [("batch", 4, "length")]
    for shape in ((1, 4, 60), (3, 4, 101), (2, 4, 9)):
        other = torch.randn(shape)
        assert difference(network(other), file.answer(other)[0]) < 1e-4


class Messages(nn.Module):
    """A layer on a graph: nodes (nodes, features), and edges (2, edges) along which they send messages."""

    def __init__(self):
        super().__init__()
        self.read, self.send, self.out = nn.Linear(5, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, nodes, edges):
        nodes = torch.relu(self.read(nodes))
        heard = torch.zeros_like(nodes).index_add(0, edges[1], self.send(nodes)[edges[0]])
        return self.out(torch.relu(nodes + heard))


@pytest.mark.costly
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_files_of_a_graph_network_take_other_graphs(suffix, tmp_path):
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime")

    def graph(nodes, edges):
        return torch.randn(nodes, 5), torch.randint(0, nodes, (2, edges))

    network = gate(Messages(), graph(6, 11)).eval()
    set_gates(network, "mixed")
    path = export(network, graph(6, 11), tmp_path / f"n{suffix}")
    file = module._WRITERS[suffix][2](path)
    if suffix == ".onnx":
        assert file.shapes == [("length", 5), ("length_2", "length_3")]
    for other in (graph(6, 11), graph(9, 4), graph(3, 30)):
        assert difference(network(*other), file.answer(other)[0]) < 1e-5


@pytest.mark.costly
def test_a_file_for_one_length_is_written_where_others_get_other_answers(tmp_path, monkeypatch, caplog):
    """As if an exporter had written the example's length into the file."""
    network, x = Tones().eval(), torch.randn(1, 4, 60)
    _, write, load = module._WRITERS[".pt2"]

    def broken(network, example, path, any_length):
        write(network, example, path, any_length)
        path.with_name("any").write_text(str(any_length))

    def loaded(path):
        file = load(path)
        wrong = path.with_name("any").read_text() == "True"
        return module.File(
            lambda b: tuple(y + (wrong and b.shape[2] < 60) for y in file.answer(b)), file.shapes
        )

    monkeypatch.setattr(module, "_WRITERS", {".pt2": ((), broken, loaded)})
    with caplog.at_level("INFO", logger=module.logger.name):
        path = export(network, x, tmp_path / "n.pt2")
    assert "n.pt2 takes sequences of one length only" in caplog.text
    assert load(path).shapes[0][1:] == (4, 60)


def test_answers_that_hardly_spread_may_differ_by_their_rounding(tmp_path):
    """Of an output of 1 and spread 1e-6 rounding is a tenth."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
    with torch.no_grad():
        network[2].weight.mul_(3e-6)
        network[2].bias.fill_(1.0)
    x = torch.randn(4, 5)
    gated = gate(network, x, droprate_init=0.05).eval()
    assert difference(gated(x), gated.double()(x.double())) > module.TOLERANCE
    smaller = compact(gated.float(), x)
    answer = torch.export.load(export(smaller, x, tmp_path / "n.pt2")).module()
    assert (answer(x) - smaller(x)).abs().max() < 1e-6
    one, exact = smaller(x), smaller.double()(x.double())
    assert apart((one,), (one + 2e-7,), module.TOLERANCE, lambda: (exact,)) == 0
    assert apart((one,), (one + 3e-6,), module.TOLERANCE, lambda: (exact,)) > module.TOLERANCE
    assert apart((one,), (one + 2e-7,), module.TOLERANCE, tuple) > module.TOLERANCE
