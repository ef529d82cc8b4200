"""A text as bytes, divided into training, validation and test parts that share nothing."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparsereg.data.text_file import (
    LEFT_OUT,
    SOURCES_OF_PYTHON,
    TextFile,
    digest,
    files_below,
    mapped,
    read_bytes,
    standard_library,
    text_file,
)
from sparsereg.errors import InputError

FEWEST_FILES = 20
"""Files from which on a folder is divided file by file."""
_BLOCKS = 200
"""Blocks that a text is cut into, if it is long enough: whole ones go to one of the parts."""
_LARGEST_BLOCK = 2**20
_PARTS = ("training", "validation", "test")


@dataclass(frozen=True, eq=False)
class Part:
    """Bytes that one of training, validation and test has.

    Args:
        text: uint8, all of it; perhaps on the disk.
        starts: int64, where the stretches begin that belong to the part.
        stops: int64, behind their ends.
    """

    text: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    @property
    def num_bytes(self) -> int:
        """Bytes of the part."""
        return int((self.stops - self.starts).sum())

    def places(self, context: int) -> np.ndarray:
        """Return how many windows of ``context`` bytes and the one behind them each stretch has."""
        found: np.ndarray = np.maximum(self.stops - self.starts - context, 0)
        return found

    def drawn(self, num: int, context: int, generator: np.random.Generator) -> np.ndarray:
        """Return where windows start that are drawn with equal probability, with replacement.

        Args:
            num: how many.
            context: bytes of a window.
            generator: of the draw.
        """
        ends = np.cumsum(self.places(context))
        at = generator.integers(0, ends[-1], num)
        stretch = np.searchsorted(ends, at, side="right")
        before = np.concatenate([[0], ends[:-1]])
        starts: np.ndarray = self.starts[stretch] + at - before[stretch]
        return starts

    def in_turn(self, num: int | None, context: int) -> np.ndarray:
        """Return where windows start that stand side by side; of more than ``num`` as many, spread evenly."""
        starts = np.concatenate(
            [np.arange(a, b - context, context) for a, b in zip(self.starts, self.stops, strict=True)]
        ).astype(np.int64)
        if num is None or len(starts) <= num:
            return starts
        return starts[np.linspace(0, len(starts) - 1, num).round().astype(np.int64)]

    def windows(self, starts: np.ndarray, context: int) -> np.ndarray:
        """Return ``context`` bytes and the one behind them for each start, uint8 (windows, context + 1)."""
        found: np.ndarray = self.text[starts[:, None] + np.arange(context + 1)]
        return found


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text in three parts.

    Args:
        name: what messages call it.
        train: training part.
        val: validation part.
        test: test part.
        num_files: files that it was read from.
        sha256: digest of its bytes and of the division.
    """

    name: str
    train: Part
    val: Part
    test: Part
    num_files: int
    sha256: str


@dataclass(frozen=True)
class TextSource:
    """Reads files of text.

    A folder of many files is divided file by file, another one and a single file in blocks: which part a file
    or a block belongs to is drawn by a generator of its own. Files are joined by a zero byte.

    Args:
        path: a file or a folder; None: the sources of Python's standard library.
        pattern: of the names of the files of a folder.
        max_memory_gb: what is read into memory at most (GiB); a single larger file stays on the disk.
    """

    path: str | None = None
    pattern: str = "*"
    max_memory_gb: float = 1.0

    def load(self, val_size: float, test_size: float, split_seed: int, context: int) -> Corpus:
        """Read and divide the text.

        Args:
            val_size: share of the bytes that validates, in [0, 1).
            test_size: share of the bytes that tests, in (0, 1).
            split_seed: of the draw.
            context: bytes of a window; each part must have one at least.

        Raises:
            InputError: there is no such file, nothing in it, or too little for the three parts.
        """
        files, name = self._files()
        total = sum(file.size for file in files)
        if total > self.max_memory_gb * 2**30 and len(files) > 1:
            raise InputError(
                f"{name}: {len(files):,} files of {total / 2**30:.2f} GiB, more than data.max_memory_gb="
                f"{self.max_memory_gb:g}: give a larger one, a data.pattern, or one single file, which stays "
                "on the disk"
            )
        if len(files) == 1:
            text = mapped(files[0]) if total > self.max_memory_gb * 2**30 else read_bytes(files[0])
        else:
            text = _joined(files)
        ends = np.cumsum([file.size + 1 for file in files]).astype(np.int64)
        if len(files) < FEWEST_FILES:
            ends = _block_ends(len(text), context)
        else:
            ends = _cut(ends, min(share for share in (val_size, test_size) if share), context)
        drawn = _drawn(ends, val_size, test_size, split_seed)
        parts = [_part(text, ends, drawn == k) for k in range(3)]
        for part, share, kind in zip(parts, (1.0, val_size, test_size), _PARTS, strict=True):
            if share and not part.places(context).sum():
                raise InputError(
                    f"{name}: {len(text):,} bytes leave no window of data.context={context} bytes for {kind}"
                    ": give more text, or a smaller context"
                )
        sha256 = digest([text, drawn.astype(np.uint8), ends.view(np.uint8)])
        train, val, test = parts
        return Corpus(name, train, val, test, len(files), sha256)

    def _files(self) -> tuple[list[TextFile], str]:
        if self.path is None:
            folder = standard_library()
            return files_below(folder, SOURCES_OF_PYTHON, LEFT_OUT), "the standard library of Python"
        path = Path(self.path).expanduser()
        name = f"data.path={self.path}"
        if path.is_dir():
            files = files_below(path, self.pattern)
            if not files:
                raise InputError(
                    f"{name}: no file there matches data.pattern={self.pattern} and has anything in it"
                )
            return files, name
        if not path.exists() and not path.is_symlink():
            raise InputError(f"{name}: there is no such file or folder")
        file = text_file(path)
        if not file.size:
            raise InputError(f"{name}: this file is empty")
        return [file], name


def _joined(files: list[TextFile]) -> np.ndarray:
    """Return all files as one array, each with a zero byte behind it."""
    text = np.zeros(sum(file.size + 1 for file in files), dtype=np.uint8)
    at = 0
    for file in files:
        text[at : at + file.size] = read_bytes(file)
        at += file.size + 1
    return text


def _block_ends(num_bytes: int, context: int) -> np.ndarray:
    """Cut bytes into blocks that hold several windows each."""
    size = min(max(num_bytes // _BLOCKS, 2 * context + 2), _LARGEST_BLOCK)
    return np.append(np.arange(size, num_bytes - size + 1, size), num_bytes).astype(np.int64)


def _cut(ends: np.ndarray, share: float, context: int) -> np.ndarray:
    """Cut files that hold more than a share of all bytes into blocks: one could be all of a part, or more."""
    sizes = np.diff(np.concatenate([[0], ends]))
    large = np.flatnonzero(sizes > share * ends[-1])
    inside = [ends[i] - sizes[i] + _block_ends(int(sizes[i]), context) for i in large]
    found: np.ndarray = np.unique(np.concatenate([ends, *inside]))
    return found


def _drawn(ends: np.ndarray, val_size: float, test_size: float, seed: int) -> np.ndarray:
    """Draw for each file or block whether it trains (0), validates (1) or tests (2).

    They are taken in a random order: the test gets them until it has its share of the bytes, then validation.
    """
    sizes = np.diff(np.concatenate([[0], ends]))
    order = np.random.default_rng(seed).permutation(len(sizes))
    behind = np.cumsum(sizes[order]) / sizes.sum()
    test = int(np.searchsorted(behind, test_size)) + 1
    val = int(np.searchsorted(behind, behind[test - 1] + val_size)) + 1 if val_size else test
    part = np.zeros(len(sizes), dtype=np.int64)
    part[order[:test]], part[order[test:val]] = 2, 1
    return part


def _part(text: np.ndarray, ends: np.ndarray, mine: np.ndarray) -> Part:
    """Return the stretches of the files or blocks that are mine; neighbours are joined."""
    starts, stops = np.concatenate([[0], ends[:-1]])[mine], ends[mine]
    first = np.concatenate([[True], starts[1:] != stops[:-1]]) if len(starts) else np.zeros(0, dtype=bool)
    last = np.concatenate([first[1:], [True]]) if len(starts) else first
    return Part(text, starts[first].astype(np.int64), stops[last].astype(np.int64))
