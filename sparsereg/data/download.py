"""Data sets that torchvision fetches."""

import contextlib
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsereg.data.arrays import ImageArrays
from sparsereg.errors import InputError

_TIMEOUT_S = 30.0
"""A silent network counts as none after this many seconds."""


def fetched(
    title: str, name: str, root: str, make: Callable[..., Any], fetch: bool = True
) -> tuple[Any, Any]:
    """Return the training and the test part of a torchvision data set, downloaded if it is not there.

    Args:
        title: the data set's name in prose.
        name: the data set's name on the command line.
        root: folder to keep the files in.
        make: torchvision's class; called with ``root``, ``train`` and ``download``.
        fetch: False reads what is there and writes nothing.

    Raises:
        InputError: the files are not there and cannot be fetched or kept.
    """
    folder = Path(root).expanduser()
    with contextlib.suppress(RuntimeError, OSError):  # not there, or damaged: fetch
        return _parts(make, folder, download=False)
    if not fetch:
        raise InputError(f"data.root={root}: {title} is not there")
    try:
        # torchvision shows its progress on stdout, which belongs to the scripts' results.
        with _network_timeout(), contextlib.redirect_stdout(sys.stderr):
            return _parts(make, folder, download=True)
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"data={name}: {title} is not in {folder.absolute()} and could not be fetched ({reason[:150]}); "
            "data=digits runs at once, without a network; data=npz data.path=FILE.npz takes your own arrays"
        ) from error


def _parts(make: Callable[..., Any], folder: Path, download: bool) -> tuple[Any, Any]:
    with warnings.catch_warnings():
        # CIFAR-10 was pickled by a NumPy that wrote 0 for False; NumPy 2.4.0 to 2.4.4 remark on it.
        warnings.filterwarnings("ignore", r"dtype\(\): align should be passed as Python or NumPy boolean")
        return (
            make(root=str(folder), train=True, download=download),
            make(root=str(folder), train=False, download=download),
        )


@contextlib.contextmanager
def _network_timeout() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def as_arrays(name: str, train: Any, test: Any) -> ImageArrays:
    """Make ``ImageArrays`` of two torchvision data sets that hold ``data`` and ``targets``."""
    images, labels = [], []
    for part in (train, test):
        pixels = np.asarray(part.data)
        pixels = pixels[..., None] if pixels.ndim == 3 else pixels
        images.append(torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))))
        labels.append(torch.as_tensor(part.targets, dtype=torch.int64))
    return ImageArrays(name, images[0], labels[0], images[1], labels[1], tuple(train.classes))
