"""Eight-bit integers instead of floats: an ONNX file whose weights and activations are quantized."""

import logging
import tempfile
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sparsereg.compression.deploy import flat_inputs
from sparsereg.compression.running import quiet
from sparsereg.errors import InputError
from sparsereg.files import write_atomically
from sparsereg.progress import doing

CALIBRATION_EXAMPLES = 512
"""How many training examples the ranges of activations are taken from."""
PACKAGES = ("onnx", "onnxruntime")


def quantize(path: str | Path, target: str | Path, batches: Iterable[Any]) -> Path:
    """Write an ONNX file in 8-bit integers: static quantization, as QuantizeLinear and DequantizeLinear.

    Weights become signed integers with a scale for each output channel, activations unsigned integers with
    one scale and zero point for each tensor, by the smallest and largest values that the batches give it.
    BatchNorm is folded and constants are computed before. How accurate the file is must be measured on it.

    Args:
        path: the ONNX file, with float weights; left as it is.
        target: the file to write, ``.onnx``.
        batches: training inputs as the network takes them, to find the ranges of activations; a few hundred
            examples.

    Returns:
        The target.

    Raises:
        InputError: a package is missing.
        ValueError: there is no batch, or ``target`` has another suffix.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from sparsereg.compression import export
        >>> folder, x = Path(tempfile.mkdtemp()), torch.randn(16, 6)
        >>> path = export(torch.nn.Linear(6, 64), x, folder / "net.onnx")
        >>> quantize(path, folder / "int8.onnx", [x]).stat().st_size > 0
        True
    """
    path, target = Path(path), Path(target)
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise InputError(
            f"quantize=int8 needs the package {missing[0]}: pip install {' '.join(PACKAGES)} onnxscript"
        )
    if target.suffix != ".onnx":
        raise ValueError(f"target must end with .onnx, got {str(target)!r}")
    told = doing(f"writing {target.name}")
    with told, tempfile.TemporaryDirectory() as folder, quiet(("root",), logging.ERROR):
        made = Path(folder) / "int8.onnx"
        _quantize(path, made, Path(folder), batches)
        content = made.read_bytes()
    write_atomically(target, lambda beside: beside.write_bytes(content))
    return target


def _quantize(path: Path, target: Path, folder: Path, batches: Iterable[Any]) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready = folder / "ready.onnx"
    quant_pre_process(str(path), str(ready), skip_symbolic_shape=True)
    reader = _Batches(ready, batches)
    if reader.empty:
        raise ValueError("quantize needs at least one batch to find the ranges of activations")
    quantize_static(
        str(ready),
        str(target),
        reader,
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


class _Batches:
    """Inputs as onnxruntime's calibration asks for them, one batch after the other."""

    def __init__(self, path: Path, batches: Iterable[Any]) -> None:
        import onnx

        graph = onnx.load(str(path), load_external_data=False).graph
        constants = {tensor.name for tensor in graph.initializer}
        self.names = [value.name for value in graph.input if value.name not in constants]
        self._feeds = self._read(batches)
        self._first = next(self._feeds, None)

    @property
    def empty(self) -> bool:
        """Whether there is no batch at all."""
        return self._first is None

    def _read(self, batches: Iterable[Any]) -> Iterator[dict[str, Any]]:
        for batch in batches:
            arrays = [x.detach().cpu().contiguous().numpy() for x in flat_inputs(batch)]
            yield dict(zip(self.names, arrays, strict=True))

    def get_next(self) -> dict[str, Any] | None:
        """Return the next batch; None at the end."""
        if self._first is not None:
            feed, self._first = self._first, None
            return feed
        return next(self._feeds, None)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Batches are read once, in order."""
