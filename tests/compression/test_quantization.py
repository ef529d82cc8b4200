import numpy as np
import pytest
import torch

from sparsereg.compression import export, quantize
from sparsereg.compression.timing.runtimes import Loaders
from sparsereg.errors import InputError
from tests.compression.networks import make, set_gates

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture
def exported(tmp_path):
    torch.manual_seed(0)
    network, x = make("residual")
    set_gates(network, "mixed")
    return network.eval(), x, export(network, x, tmp_path / "n.onnx")


@pytest.mark.costly
def test_weights_are_integers_and_answers_are_near(exported, tmp_path):
    network, x, path = exported
    batches = [torch.randn(16, *x.shape[1:]) for _ in range(2)]
    before = path.read_bytes()
    int8 = quantize(path, tmp_path / "int8.onnx", iter(batches))
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["int8.onnx", "n.onnx"]
    graph = onnx.load(str(int8)).graph
    types = {t.data_type for t in graph.initializer if len(t.dims) == 4}
    assert types == {onnx.TensorProto.INT8}
    # A scale for each output channel.
    scales = [n for t in graph.initializer if len(t.dims) == 1 and "scale" in t.name for n in t.dims]
    assert max(scales) > 1
    loaded = Loaders(x, threads=1).load(int8, "onnxruntime")
    (found,) = loaded.tensors(loaded.run(loaded.prepare(batches[0])))
    wanted = network(batches[0]).detach()
    error = (found - wanted).std() / wanted.std()
    assert 0 < error < 0.1


@pytest.mark.costly
def test_an_outlier_in_the_calibration_makes_it_coarser(exported, tmp_path):
    network, x, path = exported
    batch = torch.randn(16, *x.shape[1:])
    wanted = network(batch).detach()

    def error(calibration):
        int8 = quantize(path, tmp_path / "int8.onnx", [calibration])
        loaded = Loaders(x, threads=1).load(int8, "onnxruntime")
        (found,) = loaded.tensors(loaded.run(loaded.prepare(batch)))
        return float((found - wanted).std() / wanted.std())

    assert error(batch * 100) > 3 * error(batch)


@pytest.mark.costly
def test_wrong_arguments(exported, tmp_path, monkeypatch):
    _, x, path = exported
    with pytest.raises(ValueError, match="at least one batch"):
        quantize(path, tmp_path / "q.onnx", [])
    with pytest.raises(ValueError, match=r"end with \.onnx"):
        quantize(path, tmp_path / "q.pt2", [x])
    monkeypatch.setattr("sparsereg.compression.quantization.find_spec", lambda name: None)
    with pytest.raises(InputError, match="quantize=int8 needs the package onnx: pip install"):
        quantize(path, tmp_path / "q.onnx", [x])
    assert not (tmp_path / "q.onnx").exists()
    assert np.isfinite(path.stat().st_size)
