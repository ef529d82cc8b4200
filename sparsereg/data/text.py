"""The data module of a text: windows of bytes, and the byte that comes next at each place."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from sparsereg.archives import save_npz
from sparsereg.data.corpus import Corpus, Part, TextSource
from sparsereg.data.form import BYTES, Form
from sparsereg.data.loader import EpochOrder, Share, batch_bounds
from sparsereg.errors import InputError

log = logging.getLogger(__name__)


class WindowLoader:
    """Iterates (bytes, next bytes), both int64 (windows, context); goes where a DataLoader goes in a Trainer.

    Args:
        part: of the text.
        context: bytes of a window.
        num_windows: windows of a pass, over all processes; None: all that stand side by side.
        batch_size: windows per batch and process.
        seed: of the draw of each epoch's windows; None: always the same ones, side by side.
        share: this process's part of each batch.
    """

    def __init__(
        self,
        part: Part,
        context: int,
        num_windows: int | None,
        batch_size: int,
        seed: int | None = None,
        share: Share | None = None,
    ) -> None:
        self.part = part
        self.context = context
        self.drawn = seed is not None
        starts = None if self.drawn else part.in_turn(num_windows, context)
        self._starts = starts
        self.num_windows = num_windows if starts is None else len(starts)
        assert self.num_windows is not None
        self.sampler = EpochOrder(self.num_windows, seed or 0, shuffle=self.drawn)
        self.batch_sampler = None  # Lightning looks for it wherever there is a sampler
        self.share = share or Share()
        self.bounds = batch_bounds(self.num_windows, batch_size * self.share.num_processes)
        if min(stop - start for start, stop in self.bounds) < self.share.num_processes:
            raise InputError(
                f"{self.num_windows} windows in batches of {batch_size} leave one of "
                f"{self.share.num_processes} processes without a window; take fewer processes or a larger "
                "batch_size"
            )

    def __len__(self) -> int:
        """Number of batches in a pass; the same on every process."""
        return len(self.bounds)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass (a Trainer does it through ``sampler``)."""
        self.sampler.set_epoch(epoch)

    def starts(self) -> np.ndarray:
        """Return where the windows of this epoch start."""
        if self._starts is not None:
            return self._starts
        assert self.num_windows is not None
        return self.part.drawn(self.num_windows, self.context, self.sampler.window_generator())

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        starts = self.starts()
        for bounds in self.bounds:
            first, last = self.share.of(*bounds)
            windows = torch.from_numpy(self.part.windows(starts[first:last], self.context).astype(np.int64))
            yield windows[:, :-1], windows[:, 1:]


class TextDataModule(pl.LightningDataModule):
    """Windows of a text, byte by byte.

    An epoch of training has windows that are drawn anew, by a generator that depends on ``seed`` and the
    epoch only. Validation and test have windows that stand side by side, always the same ones.

    Args:
        source: reads the text.
        context: bytes of a window.
        train_windows: windows of an epoch.
        eval_windows: windows of validation and of test at most; None: all.
        batch_size: training windows per batch and process.
        eval_batch_size: validation and test windows per batch and process.
        val_size: share of the bytes that validates; 0: none.
        test_size: share of the bytes that tests.
        split_seed: of the draw of those parts.
        seed: of the windows of each epoch.
    """

    def __init__(
        self,
        source: TextSource,
        *,
        context: int = 128,
        train_windows: int = 512,
        eval_windows: int | None = 512,
        batch_size: int = 16,
        eval_batch_size: int = 64,
        val_size: float = 0.05,
        test_size: float = 0.05,
        split_seed: int = 42,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.source = source
        self.context = context
        self.train_windows = train_windows
        self.eval_windows = eval_windows
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_size = val_size
        self.test_size = test_size
        self.split_seed = split_seed
        self.seed = seed
        self._corpus: Corpus | None = None
        self._ready = False

    @property
    def corpus(self) -> Corpus:
        """The text; read when it is first asked for."""
        if self._corpus is None:
            self._corpus = self.source.load(self.val_size, self.test_size, self.split_seed, self.context)
        return self._corpus

    def prepare_data(self) -> None:
        """Look whether the text can be read."""
        _ = self.corpus

    def setup(self, stage: str | None = None) -> None:
        """Read the text, and count ``num_train`` (windows of an epoch), ``num_val`` and ``num_test``."""
        if self._ready:
            return
        self._ready = True
        corpus = self.corpus
        self.num_train = self.train_windows
        self.num_val = len(corpus.val.in_turn(self.eval_windows, self.context)) if self.val_size else 0
        self.num_test = len(corpus.test.in_turn(self.eval_windows, self.context))
        log.info("%s: %d files, %d training, %d validation, %d test bytes", corpus.name, corpus.num_files,
                 corpus.train.num_bytes, corpus.val.num_bytes, corpus.test.num_bytes)  # fmt: skip

    @property
    def form(self) -> Form:
        """What a network for this text is built for."""
        return Form(BYTES, (self.context,), "language_model", BYTES)

    @property
    def _share(self) -> Share:
        trainer = self.trainer
        return Share() if trainer is None else Share(trainer.global_rank, trainer.world_size)

    def train_dataloader(self) -> WindowLoader:
        """Windows that are drawn anew in each epoch; under ``overfit_batches`` always the same ones."""
        fixed = self.trainer is not None and bool(self.trainer.overfit_batches)  # type: ignore[attr-defined]
        seed = None if fixed else self.seed
        return WindowLoader(
            self.corpus.train, self.context, self.train_windows, self.batch_size, seed, self._share
        )

    def val_dataloader(self) -> WindowLoader | list[WindowLoader]:
        """Windows of the validation part, side by side; no loader if there is none."""
        return self._eval(self.corpus.val) if self.num_val else []

    def test_dataloader(self) -> WindowLoader:
        """Windows of the test part, side by side."""
        return self._eval(self.corpus.test)

    def _eval(self, part: Part) -> WindowLoader:
        return WindowLoader(part, self.context, self.eval_windows, self.eval_batch_size, share=self._share)

    def estimation_batches(self, num_images: int, batch_size: int | None = None) -> Iterator[Tensor]:
        """Yield windows of the training part, always the same ones, to estimate BatchNorm's statistics.

        Args:
            num_images: how many windows.
            batch_size: windows per batch; None: that of evaluation.
        """
        size = self.eval_batch_size if batch_size is None else batch_size
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        loader = WindowLoader(self.corpus.train, self.context, num_images, size)
        return (tokens.to(device) for tokens, _ in loader)

    def save_split(self, path: str | os.PathLike[str]) -> Path:
        """Write where the stretches of each part start and stop, as an .npz archive."""
        arrays: dict[str, Any] = {"seed": np.int64(self.split_seed), "sha256": np.array(self.corpus.sha256)}
        for name in ("train", "val", "test"):
            part: Part = getattr(self.corpus, name)
            arrays[name] = np.stack([part.starts, part.stops], axis=1)
        save_npz(Path(path), arrays)
        return Path(path)

    def describe(self) -> dict[str, Any]:
        """What the data are, in plain numbers, strings and lists."""
        corpus = self.corpus
        return {
            "source": "text",
            "name": corpus.name,
            "num_files": corpus.num_files,
            "train_bytes": corpus.train.num_bytes,
            "val_bytes": corpus.val.num_bytes,
            "test_bytes": corpus.test.num_bytes,
            "num_train": self.num_train,
            "num_val": self.num_val,
            "num_test": self.num_test,
            "num_classes": BYTES,
            "image_shape": [self.context],
            "sha256": corpus.sha256,
            "split_seed": self.split_seed,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }
