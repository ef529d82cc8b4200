"""Files of text of a stranger, read as bytes: what is opened, how much is held in memory."""

import hashlib
import os
import stat
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from sparsereg.errors import InputError
from sparsereg.files import is_folder

SOURCES_OF_PYTHON = "*.py"
"""Pattern of the files of the standard library."""
LEFT_OUT = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3")
"""Folders of the standard library that are not read: what was installed beside it, and what some systems
leave out."""
_HASHED = 2**26
"""Bytes of a file that its digest is taken of: all of a small one, pieces of a larger one."""


def standard_library() -> Path:
    """Return the folder of Python's own modules.

    Raises:
        InputError: this Python keeps them elsewhere, in an archive, say.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    if not (folder / "os.py").is_file():
        raise InputError(
            f"data.path=null: {folder} has not the sources of this Python: give data.path=FILE|FOLDER"
        )
    return folder


@dataclass(frozen=True)
class TextFile:
    """A file that is there and may be read.

    Attributes:
        name: relative to the folder, with slashes.
        path: of the file.
        size: in bytes.
    """

    name: str
    path: Path
    size: int


def files_below(folder: Path, pattern: str, left_out: Sequence[str] = ()) -> list[TextFile]:
    """Return the files below a folder, by name.

    Hidden files and folders, links to folders and empty files are passed over.

    Args:
        folder: where.
        pattern: of their names, as in a shell.
        left_out: names of folders that are not entered.

    Raises:
        InputError: one is no regular file, leads out of the folder, or cannot be read; names it.
    """
    root = folder.resolve()
    found = [text_file(path, root) for path in _paths(folder, pattern, left_out)]
    return sorted((file for file in found if file.size), key=lambda file: file.name)


def _paths(folder: Path, pattern: str, left_out: Sequence[str]) -> Iterator[Path]:
    try:
        with os.scandir(folder) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{folder}: this folder cannot be read ({error.strerror})") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if is_folder(entry):
            if not entry.is_symlink() and entry.name not in left_out:
                yield from _paths(Path(entry.path), pattern, left_out)
        elif fnmatch(entry.name, pattern):
            yield Path(entry.path)


def text_file(path: Path, root: Path | None = None) -> TextFile:
    """Check, without opening it, that a path is a file that may be read.

    Args:
        path: of the file, or of a link to one.
        root: the resolved folder that links may not leave; None: wherever they lead.

    Raises:
        InputError: it is something else; names it.
    """
    try:
        target = path.resolve(strict=True)
        status = target.stat()
    except (OSError, RuntimeError) as error:  # Python < 3.13 raises a RuntimeError for links in a circle
        raise InputError(f"{path}: this link leads nowhere, or the file has gone; take it out") from error
    if root is not None and not target.is_relative_to(root):
        raise InputError(f"{path}: this link leads out of data.path, to {target}; put the file itself there")
    _check_regular(path, status)
    if not os.access(target, os.R_OK):
        raise InputError(f"{path}: this file cannot be read (permission denied)")
    name = path.name if root is None else os.path.relpath(path.parent.resolve() / path.name, root)
    return TextFile(name.replace(os.sep, "/"), path, status.st_size)


def _check_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
        what = kinds.get(stat.S_IFMT(status.st_mode), "a device")
        raise InputError(f"{path}: this is {what}, expected a file of text; take it out of data.path")


def read_bytes(file: TextFile) -> np.ndarray:
    """Read a whole file as uint8.

    Raises:
        InputError: it cannot be read, or is no longer as long as it was.
    """
    try:
        # Without waiting, in case that it has become a pipe since it was listed.
        descriptor = os.open(
            file.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        )
        with os.fdopen(descriptor, "rb") as opened:
            _check_regular(file.path, os.fstat(opened.fileno()))
            content = opened.read(file.size + 1)
    except OSError as error:
        raise InputError(f"{file.path}: this file cannot be read ({error.strerror})") from error
    if len(content) != file.size:
        raise InputError(
            f"{file.path}: this file has changed while it was read; run again when it is at rest"
        )
    return np.frombuffer(content, dtype=np.uint8)


def mapped(file: TextFile) -> np.ndarray:
    """Return a file as uint8 that stays on the disk and is read where it is looked at.

    Raises:
        InputError: it cannot be mapped into memory.
    """
    try:
        return np.memmap(file.path, dtype=np.uint8, mode="r", shape=(file.size,))
    except (OSError, ValueError) as error:
        raise InputError(f"{file.path}: this file cannot be mapped into memory ({error})") from error


def digest(pieces: Sequence[np.ndarray]) -> str:
    """Return the SHA-256 of bytes: of all of them, of large ones of pieces that are spread evenly.

    Args:
        pieces: uint8, each of any length.
    """
    whole = hashlib.sha256()
    for piece in pieces:
        whole.update(str(len(piece)).encode())
        if len(piece) <= _HASHED:
            whole.update(piece.tobytes())
            continue
        size = _HASHED // 64
        for start in np.linspace(0, len(piece) - size, 64).astype(np.int64):
            whole.update(piece[start : start + size].tobytes())
    return whole.hexdigest()
