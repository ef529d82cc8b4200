"""Texts with a class each, byte by byte: from a table in CSV, or from folders named by their class."""

import csv
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from sparsereg.data.form import BYTES, Form
from sparsereg.data.loader import EpochOrder, Share, batch_bounds
from sparsereg.data.split import Split
from sparsereg.data.text_file import TextFile, digest, files_below, read_bytes, text_file
from sparsereg.errors import InputError

log = logging.getLogger(__name__)

_ROUNDED = 16
"""A batch is padded to a multiple of this, so that there are few different lengths."""


@dataclass(frozen=True, eq=False)
class Texts:
    """Texts in memory, cut to a length.

    Args:
        tokens: uint8, (texts, longest), zeros behind the end.
        lengths: int64, (texts,), >= 1.
        labels: int64, (texts,).
        test: bool, (texts,), those that test; None: they are drawn.
        class_names: in the order of their labels.
    """

    tokens: Tensor
    lengths: Tensor
    labels: Tensor
    test: Tensor | None
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class TextClasses:
    """Reads ``PATH/CLASS/*``, ``PATH/train/CLASS/*`` with ``PATH/test/CLASS/*``, or a CSV file with a header.

    Args:
        path: the folder or the file.
        text: column of the texts.
        label: column of the classes.
        max_memory_gb: what is held in memory at most (GiB).
    """

    path: str | None = None
    text: str = "text"
    label: str = "label"
    max_memory_gb: float = 1.0

    def load(self, context: int) -> Texts:
        """Read the texts.

        Args:
            context: bytes that are read of each.

        Raises:
            InputError: no path, no such file, a column is missing, or there are fewer than two classes.
        """
        if not self.path:
            raise InputError("data=labelled_text needs a table or a folder: data.path=FILE.csv|FOLDER")
        path = Path(self.path).expanduser()
        if not path.exists():
            raise InputError(f"data.path={path}: there is no such file or folder")
        found = self._folder(path, context) if path.is_dir() else self._table(path, context)
        contents, names, test = zip(*found, strict=True) if found else ((), (), ())
        classes = sorted(set(names))
        if len(classes) < 2:
            raise InputError(
                f"data.path={path}: expected texts of at least two classes, found {len(classes)}"
            )
        longest = max(map(len, contents))
        tokens = np.zeros((len(contents), longest), dtype=np.uint8)
        for row, content in zip(tokens, contents, strict=True):
            row[: len(content)] = np.frombuffer(content, dtype=np.uint8)
        number = {name: k for k, name in enumerate(classes)}
        return Texts(
            torch.from_numpy(tokens),
            torch.tensor([len(content) for content in contents]),
            torch.tensor([number[name] for name in names]),
            None if None in test else torch.tensor(test, dtype=torch.bool),
            tuple(classes),
        )

    def _folder(self, path: Path, context: int) -> list[tuple[bytes, str, bool | None]]:
        parts: dict[str, bool | None] = {"": None}
        if (path / "train").is_dir() and (path / "test").is_dir():
            parts = {"train/": False, "test/": True}
        files = files_below(path, "*")
        self._check_size(path, len(files) * context)
        found: list[tuple[bytes, str, bool | None]] = []
        for prefix, test in parts.items():
            for file in files:
                name, _, rest = file.name.removeprefix(prefix).partition("/")
                if file.name.startswith(prefix) and rest:
                    found.append((_beginning(file, context), name, test))
        return found

    def _table(self, path: Path, context: int) -> list[tuple[bytes, str, bool | None]]:
        file = text_file(path)
        self._check_size(path, file.size)
        text = read_bytes(file).tobytes()
        try:
            rows = csv.reader(text.decode("utf-8-sig").splitlines(keepends=True), strict=True)
            header = next(rows, [])
            columns = [self._column(path, header, name) for name in (self.text, self.label)]
            found: list[tuple[bytes, str, bool | None]] = []
            for number, row in enumerate(rows, 2):
                if not row:
                    continue
                if len(row) != len(header):
                    raise InputError(
                        f"data.path={path}: row {number} has {len(row)} values, the header {len(header)}"
                    )
                content, name = (row[column] for column in columns)
                if not content or not name:
                    raise InputError(f"data.path={path}: row {number} lacks its text or its class")
                found.append((content.encode()[:context], name, None))
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"data.path={path}: cannot be read as CSV in UTF-8: {error}") from error
        return found

    def _column(self, path: Path, header: list[str], name: str) -> int:
        if header.count(name) != 1:
            raise InputError(
                f"data.path={path}: expected one column {name!r} (data.text=, data.label=), the header has "
                f"{', '.join(header)[:200] or 'nothing'}"
            )
        return header.index(name)

    def _check_size(self, path: Path, size: int) -> None:
        if size > self.max_memory_gb * 2**30:
            raise InputError(
                f"data.path={path}: {size / 2**30:.2f} GiB, more than "
                f"data.max_memory_gb={self.max_memory_gb:g}"
            )


def _beginning(file: TextFile, context: int) -> bytes:
    return read_bytes(file)[:context].tobytes()


class TextLoader:
    """Iterates dictionaries ``input_ids``, ``attention_mask`` (both (texts, length), int64) and ``labels``.

    A batch is as long as its longest text, rounded up.

    Args:
        texts: all of them.
        positions: those to iterate.
        batch_size: texts per batch and process.
        seed: of the order; None: as they stand.
        share: this process's part of each batch.
    """

    def __init__(
        self,
        texts: Texts,
        positions: Tensor,
        batch_size: int,
        seed: int | None = None,
        share: Share | None = None,
    ) -> None:
        self.texts, self.positions = texts, positions
        self.sampler = EpochOrder(len(positions), seed or 0, shuffle=seed is not None)
        self.batch_sampler = None  # Lightning looks for it wherever there is a sampler
        self.share = share or Share()
        self.bounds = batch_bounds(len(positions), batch_size * self.share.num_processes)
        if not self.bounds or min(b - a for a, b in self.bounds) < self.share.num_processes:
            raise InputError(
                f"{len(positions)} texts in batches of {batch_size} leave one of {self.share.num_processes} "
                "processes without a text"
            )

    def __len__(self) -> int:
        """Number of batches in a pass; the same on every process."""
        return len(self.bounds)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = self.positions[self.sampler.order()]
        for bounds in self.bounds:
            first, last = self.share.of(*bounds)
            rows = order[first:last]
            lengths = self.texts.lengths[rows]
            longest = -(-int(lengths.max()) // _ROUNDED) * _ROUNDED
            length = min(longest, self.texts.tokens.shape[1])
            yield {
                "input_ids": self.texts.tokens[rows, :length].long(),
                "attention_mask": (torch.arange(length) < lengths[:, None]).long(),
                "labels": self.texts.labels[rows],
            }


class LabelledTextModule(pl.LightningDataModule):
    """Training, validation and test texts.

    Args:
        source: reads them.
        context: bytes that are read of each.
        batch_size: training texts per batch and process.
        eval_batch_size: validation and test texts per batch and process.
        val_size: training texts that validate: a count, or a fraction in (0, 1); 0: none.
        test_size: share of the texts that tests, where the folder does not say it.
        split_seed: of the draw of both.
        seed: of the order of the training texts.
    """

    def __init__(
        self,
        source: TextClasses,
        *,
        context: int = 256,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        val_size: int | float = 0.1,
        test_size: float = 0.1,
        split_seed: int = 42,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.source = source
        self.context = context
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_size = val_size
        self.test_size = test_size
        self.split_seed = split_seed
        self.seed = seed
        self._texts: Texts | None = None

    def prepare_data(self) -> None:
        """Read the texts."""
        _ = self.texts

    @property
    def texts(self) -> Texts:
        """All texts; read when they are first asked for."""
        if self._texts is None:
            self._texts = self.source.load(self.context)
        return self._texts

    def setup(self, stage: str | None = None) -> None:
        """Divide them; sets ``num_train``, ``num_val``, ``num_test`` and ``split``."""
        texts = self.texts
        if texts.test is None:
            whole = Split.draw(len(texts.labels), self.test_size, self.split_seed)
            train, self.test = whole.train, whole.val
        else:
            train, self.test = (~texts.test).nonzero()[:, 0], texts.test.nonzero()[:, 0]
        within = Split.draw(len(train), self.val_size, self.split_seed + 1)
        self.split = Split(train[within.train], train[within.val], self.split_seed)
        self.num_train, self.num_val, self.num_test = (
            len(self.split.train),
            len(self.split.val),
            len(self.test),
        )

    @property
    def form(self) -> Form:
        """What a network for these texts is built for."""
        kinds = dict.fromkeys(("input_ids", "attention_mask"), ("int64", (self.context,)))
        return Form(len(self.texts.class_names), (self.context,), "text_classification", BYTES, kinds)

    def _loader(self, positions: Tensor, size: int, seed: int | None = None) -> TextLoader:
        trainer = self.trainer
        share = Share() if trainer is None else Share(trainer.global_rank, trainer.world_size)
        return TextLoader(self.texts, positions, size, seed, share)

    def train_dataloader(self) -> TextLoader:
        """Training texts in a random order; under ``overfit_batches`` in a fixed one."""
        fixed = self.trainer is not None and bool(self.trainer.overfit_batches)  # type: ignore[attr-defined]
        return self._loader(self.split.train, self.batch_size, None if fixed else self.seed)

    def val_dataloader(self) -> TextLoader | list[TextLoader]:
        """Validation texts; no loader if there are none."""
        return self._loader(self.split.val, self.eval_batch_size) if self.num_val else []

    def test_dataloader(self) -> TextLoader:
        """Test texts."""
        return self._loader(self.test, self.eval_batch_size)

    def estimation_batches(
        self, num_images: int, batch_size: int | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """Yield training texts, always the same ones, to estimate BatchNorm's statistics.

        Args:
            num_images: how many texts.
            batch_size: texts per batch; None: that of evaluation.
        """
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        positions = self.split.train[:num_images]
        for batch in TextLoader(self.texts, positions, batch_size or self.eval_batch_size):
            yield {name: value.to(device) for name, value in batch.items() if name != "labels"}

    def save_split(self, path: str | os.PathLike[str]) -> Path:
        """Write which texts train and which validate, as ``Split.save`` does."""
        return self.split.save(path)

    def describe(self) -> dict[str, Any]:
        """What the data are, in plain numbers, strings and lists."""
        texts = self.texts
        return {
            "source": "labelled_text",
            "name": str(self.source.path),
            "num_train": self.num_train,
            "num_val": self.num_val,
            "num_test": self.num_test,
            "num_classes": len(texts.class_names),
            "image_shape": [self.context],
            "sha256": digest([texts.tokens.numpy().reshape(-1), texts.labels.numpy().view(np.uint8)]),
            "split_seed": self.split_seed,
            "split_sha256": self.split.digest,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }
