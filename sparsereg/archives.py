"""Binary files that show every damage: archives of torch.save and numpy.savez, sealed and checked.

Both are zip files, whose readers check little or nothing. What is written here ends with a seal, a digest of
every byte before it in the comment that a zip file may have, so that other programs still read it, and a copy
of the file alone keeps it. What others wrote has no seal; then the checksum of every part has to be right.
Nothing is loaded before.
"""

import hashlib
import io
import os
import pickle
import re
import struct
import tokenize
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsereg.errors import DamagedFile
from sparsereg.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import numpy as np
    from torch import Tensor

_MARK = b"sparsereg sha256 "
_SEAL = len(_MARK) + 64
_END = b"PK\x05\x06"
_END_SIZE = 22
_CHUNK = 1 << 20
_REPEATED = 2**26
"""Bytes that a tensor in a file may come to by repeating few numbers."""


def save_torch(path: Path, content: Any) -> None:
    """Write what ``torch.load(weights_only=True)`` reads, whole or not at all, with a seal.

    Args:
        path: the file.
        content: tensors, numbers, strings and containers of them.
    """
    import torch

    def write(beside: Path) -> None:
        torch.save(content, beside)
        seal(beside)

    write_atomically(path, write)


def load_torch(path: str | os.PathLike[str], map_location: Any = "cpu", mmap: bool | None = None) -> Any:
    """Read what torch.save wrote, after every byte of it was checked; nothing but data is loaded.

    Args:
        path: the file.
        map_location: of ``torch.load``.
        mmap: of ``torch.load``.

    Raises:
        DamagedFile: not every byte is as it was written, or this is something else.
    """
    import torch

    check(path)
    try:
        with warnings.catch_warnings():  # of sparse tensors, which are refused
            warnings.filterwarnings("ignore", message=".*sparse tensor", category=UserWarning)
            return _dense(torch.load(path, map_location=map_location, weights_only=True, mmap=mmap))
    except (*BROKEN, pickle.UnpicklingError) as error:
        raise DamagedFile(f"it holds something else than data of torch.save ({_short(error)})") from error


def load_weights(path: str | os.PathLike[str]) -> Any:
    """Read a state dict as others hand it out; besides archives, files in the format before PyTorch 1.6.

    Those have no checksums; their names may have one, as torchvision's do: ``NAME-DIGEST.pth``.

    Raises:
        DamagedFile: not every byte is as it was written, or this is something else.
    """
    import torch

    with open(path, "rb") as file:
        if file.read(4) == b"PK\x03\x04":
            return load_torch(path)
        size = file.seek(0, os.SEEK_END)
        named = re.search(r"-([0-9a-f]{8,64})\.pth$", Path(path).name)
        if named is not None and not _digest(file, size).startswith(named.group(1).encode()):
            raise DamagedFile("its digest is not the one in its name")
    try:
        return _dense(torch.load(path, map_location="cpu", weights_only=True))
    except (*BROKEN, pickle.UnpicklingError) as error:
        raise DamagedFile(f"it holds something else than data of torch.save ({_short(error)})") from error


def _dense(content: Any) -> Any:
    """Return what a file holds if all of its tensors are ordinary ones; nothing else can be computed with.

    Raises:
        DamagedFile: one is sparse, quantized, nested, has no numbers, or repeats few of them too often.
    """
    import torch

    left = [content]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            left += part.values()
        elif isinstance(part, list | tuple):
            left += part
        elif isinstance(part, torch.Tensor):
            if part.layout is not torch.strided or part.is_quantized or part.is_nested or part.is_meta:
                raise DamagedFile("it holds a tensor that is sparse, quantized, nested or without numbers")
            claimed = part.numel() * part.element_size()
            if claimed > max(part.untyped_storage().nbytes(), _REPEATED):
                raise DamagedFile(f"it holds a tensor of shape {tuple(part.shape)} that repeats few numbers")
    return content


def not_finite(weights: "Mapping[str, Tensor]", parameters: "Collection[str]") -> str | None:
    """Return the name of a tensor that makes no sense to go on with, or None.

    Args:
        weights: a state dict.
        parameters: names of those that are trained, in which infinity is wrong, too; of the others a mask,
            say, may hold it. NaN is wrong in all of them.
    """
    for name, value in weights.items():
        if not (value.is_floating_point() or value.is_complex()) or value.is_meta:
            continue
        numbers = value if value.element_size() > 1 else value.float()  # those of 8 bits cannot be asked
        if not bool((numbers.isfinite() if name in parameters else ~numbers.isnan()).all()):
            return name
    return None


def save_npz(path: Path, arrays: "dict[str, np.ndarray]") -> None:
    """Write a compressed .npz archive, whole or not at all, with a seal.

    Args:
        path: the file.
        arrays: name to array.
    """
    import numpy as np

    def write(beside: Path) -> None:
        with beside.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        seal(beside)

    write_atomically(path, write)


def load_npz(path: str | os.PathLike[str]) -> "dict[str, np.ndarray]":
    """Read an .npz archive, after every byte of it was checked; nothing in it is unpickled.

    Raises:
        DamagedFile: not every byte is as it was written.
    """
    import numpy as np

    check(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except BROKEN as error:
        raise DamagedFile(f"it holds something else than arrays of numpy.savez ({_short(error)})") from error


def seal(path: Path) -> None:
    """Append to a zip file, as its comment, a digest of everything before it.

    Args:
        path: an archive without a comment; changed in place.
    """
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size - _END_SIZE)
        end = file.read()
        assert end.startswith(_END), "a zip file ends with its directory"
        assert end.endswith(b"\0\0"), "this zip file has a comment"
        file.seek(size - 2)
        file.write(_SEAL.to_bytes(2, "little"))
        digest = _digest(file, size)
        file.seek(size)
        file.write(_MARK + digest)


def check(path: str | os.PathLike[str]) -> None:
    """Check that a zip file is as it was written: by its seal, or by the checksum of every part.

    Args:
        path: the file.

    Raises:
        DamagedFile: it is not, or this is no zip file.
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _SEAL))
        tail = file.read()
        if tail.startswith(_MARK):
            if _digest(file, size - _SEAL) != tail[len(_MARK) :]:
                raise DamagedFile("it was changed after it was written: its digest differs")
            return
        _check_parts(file, size)


def _digest(file: io.BufferedIOBase | io.BufferedRandom, size: int) -> bytes:
    """The hexadecimal SHA-256 of the first ``size`` bytes."""
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0 and (chunk := file.read(min(_CHUNK, size))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest().encode()


def _check_parts(file: io.BufferedReader, size: int) -> None:
    """Check directory, names and CRC of every part of an archive that has no seal."""
    file.seek(max(0, size - _END_SIZE))
    end = file.read()
    if not (end.startswith(_END) and end.endswith(b"\0\0")):
        file.seek(0)
        if file.read(4) == b"PK\x03\x04":
            raise DamagedFile("it is cut off, or its end was changed")
        raise DamagedFile("it is not an archive of torch.save or numpy.savez")
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
            declared = int.from_bytes(end[10:12], "little")
            if declared not in (len(parts), 0xFFFF) or len({p.filename for p in parts}) != len(parts):
                raise DamagedFile("its directory was changed")
            for part in parts:
                with archive.open(part) as stream:  # reading to the end compares the CRC
                    while stream.read(_CHUNK):
                        pass
    except DamagedFile:
        raise
    except BROKEN as error:
        raise DamagedFile(f"a part of it was changed after it was written ({_short(error)})") from error


BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, LookupError, TypeError, AttributeError,
           OverflowError, struct.error, NotImplementedError, RuntimeError, OSError, SyntaxError,
          tokenize.TokenError)  # fmt: skip
"""What zipfile, np.load and torch.load raise on files that are damaged or something else."""


def _short(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:120] or type(error).__name__
