"""Files that appear whole or not at all, and folders that are never shared or overwritten.

Everything that the project writes goes through ``write_atomically``: the new file is filled beside its
place, brought to the disk, and takes the place in one step. A process that is killed, or a disk that is full,
leaves what was there before, and at most a file named ``.writing-*``, which the next writer removes.
"""

import contextlib
import errno
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sparsereg.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows has no such locks: leftovers stay there
    fcntl = None  # type: ignore[assignment]

LEFTOVER = ".writing-"
"""How the names of unfinished files start."""
_NO_ROOM = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "your quota on this disk is used up: free some space",
    errno.EFBIG: "a limit on the size of files (ulimit -f, or the file system's) is too small",
}
_PROBE = 1 << 20


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path``, bring it to the disk, then rename it.

    What was at ``path`` before stays until then, and for good if anything fails.

    Args:
        path: the file to make.
        write: gets the temporary path, which has the same suffix.

    Raises:
        OutputError: the disk is full, or the folder cannot be written to.
    """
    if path.name.startswith(LEFTOVER):  # within another write, which cares for all that
        write(path)
        return
    with _beside(path) as beside:
        _fill(beside, path, write)
        with _reported(path):
            os.replace(beside, path)
            _flush(path.parent)


def write_new(path: Path, write: Callable[[Path], object]) -> Path:
    """Write as ``write_atomically`` does, but never over another file; return where it went.

    Args:
        path: where to; if that is taken, the first free one of ``stem-1.suffix``, ``stem-2.suffix`` ...
        write: gets the temporary path, which has the same suffix.
    """
    with _beside(path) as beside:
        _fill(beside, path, write)
        with _reported(path):
            number, free = 0, path
            while not _place(beside, free):
                number += 1
                free = path.with_name(f"{path.stem}-{number}{path.suffix}")
            _flush(path.parent)
    return free


def _place(beside: Path, path: Path) -> bool:
    """Give a file a name unless the name is taken."""
    try:
        os.link(beside, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links: claim the name, then take it
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        os.replace(beside, path)
    return True


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Yield an empty temporary file in the folder of ``path``; nothing is left of it afterwards."""
    with _reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent.glob(f"{LEFTOVER}*"))
        handle, beside = _locked_file(path)
    try:
        yield beside
    finally:
        beside.unlink(missing_ok=True)
        os.close(handle)


def _locked_file(path: Path) -> tuple[int, Path]:
    """Make a temporary file whose lock tells others that somebody is writing it."""
    while True:
        handle, name = tempfile.mkstemp(prefix=LEFTOVER, suffix=f"-{path.name[-100:]}", dir=path.parent)
        _lock(handle)
        if os.fstat(handle).st_nlink:  # else it was taken for a leftover before it was locked
            return handle, Path(name)
        os.close(handle)


def _lock(handle: int) -> bool:
    """Lock an open file; whether that was possible, and nobody else has."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def remove_leftovers(files: Iterator[Path]) -> None:
    """Remove unfinished files whose writers were killed; files that are being written stay.

    Args:
        files: named ``.writing-*``; others are left alone.
    """
    for file in files:
        with contextlib.suppress(OSError):
            if not file.name.startswith(LEFTOVER) or file.is_symlink():
                continue
            handle = os.open(file, os.O_RDWR)
            try:
                if _lock(handle):
                    file.unlink()
            finally:
                os.close(handle)


def _fill(beside: Path, path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill the file, and bring it to the disk; say it plainly if there is no room."""
    try:
        write(beside)
        umask = os.umask(0)
        os.umask(umask)
        beside.chmod(0o666 & ~umask)
        _flush(beside)
    except Exception as error:
        reason = no_room(error) or _no_room_for_more(beside)
        if reason is None:
            if isinstance(error, OSError) and error.filename == str(beside):
                raise _refused(path, error) from error
            raise
        raise OutputError(f"{path} cannot be written: {reason}; nothing was changed") from error


def no_room(error: BaseException | None) -> str | None:
    """Return what to do if an error, or one behind it, says that the disk has no room left; else None."""
    seen = 0
    while error is not None and seen < 20:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return _NO_ROOM[error.errno]
        error, seen = error.__cause__ or error.__context__, seen + 1
    return None


def _no_room_for_more(beside: Path) -> str | None:
    """Find out whether the disk is full by writing on; not every library says why it failed."""
    try:
        with beside.open("ab") as file:
            file.write(b"\xff" * _PROBE)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return no_room(error)
    return None


@contextlib.contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Within this context an OSError is about writing ``path`` and says so in one line."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise _refused(path, error) from error


def _refused(path: Path, error: OSError) -> OutputError:
    reason = no_room(error) or f"{error.strerror or error}; make the folder writable or run elsewhere"
    return OutputError(f"{path} cannot be written: {reason}")


def _flush(path: Path) -> None:
    """Bring a file or a folder's list of names to the disk, so that it survives a loss of power."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():  # Windows opens no folders
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # a file system without it
            raise
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text whole or not at all, as UTF-8."""
    write_atomically(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object whole or not at all; NaN and infinity, which JSON does not have, become null."""
    write_text(path, json.dumps(_plain(content), indent=2) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def is_folder(entry: "os.DirEntry[str]") -> bool:
    """Whether an entry is a folder; a link in a circle is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def new_version(parent: Path) -> Path:
    """Make and return the next free folder ``parent/version_N``; safe beside other processes."""
    with _reported(parent):
        parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(parent.glob(f"version_*/**/{LEFTOVER}*"))
        taken = [p.name.removeprefix("version_") for p in parent.glob("version_*")]
        number = max((int(t) for t in taken if t.isdigit()), default=-1) + 1
        while True:
            folder = parent / f"version_{number}"
            if _made(folder):
                return folder
            number += 1


def new_folder(path: Path) -> Path:
    """Make and return ``path``, or the first of ``path-1``, ``path-2`` ... that nobody else has made."""
    with _reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        number, folder = 0, path
        while not _made(folder):
            number += 1
            folder = path.with_name(f"{path.name}-{number}")
        return folder


def _made(folder: Path) -> bool:
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    _flush(folder.parent)
    return True
