"""A LightningDataModule of the user's, as what a training run asks of its data."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from sparsereg import own_code
from sparsereg.data.batches import inputs_and_labels, moved, num_examples
from sparsereg.data.form import Form, Inputs
from sparsereg.data.labelled_text import LabelledTextModule
from sparsereg.data.module import ImageDataModule
from sparsereg.data.text import TextDataModule
from sparsereg.errors import InputError

SEED = 0
"""Of the order of shuffled images that BatchNorm statistics are taken from."""


class OwnDataModule(pl.LightningDataModule):
    """Passes on what a data module of the user's does, and finds out its task, classes, shape and sizes.

    Batches are pairs (inputs, labels), or dictionaries of tensors with ``labels`` among them. ``task``,
    ``num_classes``, ``image_shape`` and ``vocabulary`` are attributes of the module, the classes perhaps of
    its training set (``classes``), or else found by looking at the first batch and at the labels:
    floating-point inputs are images, integers are tokens; one label for each example, one for each pixel, or
    the next token at each place.

    Args:
        inner: the user's.
        said: setting that names it, for messages.

    Raises:
        InputError: it is no such module.
    """

    def __init__(self, inner: pl.LightningDataModule, said: str) -> None:
        if not isinstance(inner, pl.LightningDataModule):
            raise InputError(f"{said}: expected a LightningDataModule, it makes a {type(inner).__name__}")
        self.inner = inner
        super().__init__()
        self.said = said
        self._ready = False

    @property
    def trainer(self) -> pl.Trainer | None:
        """The Trainer, which the user's module knows, too."""
        return self.inner.trainer

    @trainer.setter
    def trainer(self, trainer: pl.Trainer | None) -> None:
        self.inner.trainer = trainer

    def prepare_data(self) -> None:
        """As the user's."""
        self.inner.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Set up training and test, once, and look at the data."""
        if self._ready:
            return
        for one in ("fit", "test"):
            self.inner.setup(one)
        loaders = {part: self._loader(part) for part in ("train", "val", "test")}
        if loaders["train"] is None or loaders["test"] is None:
            missing = "train" if loaders["train"] is None else "test"
            raise InputError(f"{self.said}: has no {missing}_dataloader, which train.py and test.py need")
        self.num_train, self.num_val, self.num_test = (_size(loaders[p]) for p in ("train", "val", "test"))
        batch = next(iter(self.train_dataloader()), None)
        inputs, labels = self._parts(batch)
        main = self._main(inputs)
        shape = getattr(self.inner, "image_shape", None)
        self.image_shape = tuple(int(n) for n in (main.shape[1:] if shape is None else shape))
        if not 1 <= len(self.image_shape) <= 3:
            raise InputError(f"{self.said}: expected examples of 1 to 3 dimensions, got {self.image_shape}")
        self.tokens = not main.is_floating_point()
        self.task = getattr(self.inner, "task", None) or self._task(main, labels)
        self.inputs = (
            {k: (str(v.dtype).removeprefix("torch."), tuple(v.shape[1:])) for k, v in inputs.items()}
            if isinstance(inputs, Mapping)
            else None
        )
        self.vocabulary = self._vocabulary() if self.tokens else None
        self.num_classes = self._count_classes()
        self._ready = True

    @property
    def form(self) -> Form:
        """What a network for these data is built for."""
        return Form(self.num_classes, self.image_shape, self.task, self.vocabulary, self.inputs)

    def _parts(self, batch: Any) -> tuple[Any, Any]:
        """Return inputs and labels of a batch, checked."""
        if batch is None:
            raise InputError(f"{self.said}: expected batches (inputs, labels), got no batch")
        try:
            inputs, labels = inputs_and_labels(batch)
        except TypeError as error:
            raise InputError(f"{self.said}: {error}") from error
        for name, part in inputs.items() if isinstance(inputs, Mapping) else (("inputs", inputs),):
            if not isinstance(part, Tensor) or part.dim() < 1:
                kind = f"a {type(part).__name__}" if not isinstance(part, Tensor) else "a single number"
                raise InputError(
                    f"{self.said}: expected tensors with a dimension of examples, {name} is {kind}"
                )
        if isinstance(inputs, Mapping) and not inputs:
            raise InputError(f"{self.said}: batches hold labels and nothing else")
        return inputs, labels

    def _main(self, inputs: Any) -> Tensor:
        """Return the input that tells what the data are: the first that is no mask."""
        if not isinstance(inputs, Mapping):
            return inputs  # type: ignore[no-any-return]
        found: Tensor = next((v for k, v in inputs.items() if "mask" not in k), next(iter(inputs.values())))
        return found

    def _task(self, main: Tensor, labels: Any) -> str:
        """Find out by types and dimensions of a batch what its labels are for; "own" if that is unknown."""
        if labels is None:
            return "language_model" if self.tokens and main.dim() == 2 else "own"
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            return "own"
        if labels.dim() == 1:
            if labels.dtype != torch.int64:
                raise InputError(f"{self.said}: expected int64 labels of shape (batch,), got {labels.dtype}")
            return "text_classification" if self.tokens else "classification"
        if self.tokens:
            return "language_model" if labels.shape == main.shape else "own"
        sizes = (labels.shape[1:], labels.shape[2:] if labels.shape[1] == 1 else None)
        return "segmentation" if main.dim() == 4 and main.shape[2:] in sizes else "own"

    def _vocabulary(self) -> int:
        known = getattr(self.inner, "vocabulary", None)
        return (
            known
            if isinstance(known, int)
            else 1 + self._largest(lambda batch: self._main(self._parts(batch)[0]))
        )

    def _count_classes(self) -> int:
        dataset = getattr(self._loader("train"), "dataset", None)
        for known in (self.inner, dataset):
            if isinstance(number := getattr(known, "num_classes", None), int):
                return number
            if isinstance(classes := getattr(known, "classes", None), list | tuple):
                return len(classes)
        if self.task == "language_model":
            assert self.vocabulary is not None
            return self.vocabulary
        if self.task == "own":
            return 1  # nobody knows; a network of the user's need not ask
        ignored = 255 if self.task == "segmentation" else None
        return 1 + self._largest(lambda batch: self._parts(batch)[1], ignored)

    def _largest(self, of: Callable[[Any], Tensor], ignored: int | None = None) -> int:
        """Return the largest number in a part of all batches, but for one that does not count."""
        largest = -1
        for part in ("train", "val", "test"):
            for batch in self._loader(part) or ():
                values = of(batch)
                if ignored is not None:
                    values = values[values != ignored]
                largest = max(largest, int(values.max()) if values.numel() else -1)
        return largest

    def _loader(self, part: str) -> Any:
        """Return a loader; None where the user's module has none."""
        try:
            return getattr(self.inner, f"{part}_dataloader")() or None
        except MisconfigurationException:  # of Lightning's own method
            return None

    def train_dataloader(self) -> Any:
        """As the user's."""
        return self.inner.train_dataloader()

    def val_dataloader(self) -> Any:
        """As the user's; no loader if there is none."""
        return self._loader("val") or []

    def test_dataloader(self) -> Any:
        """As the user's."""
        return self.inner.test_dataloader()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """As the user's."""
        return self.inner.on_before_batch_transfer(batch, dataloader_idx)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """As the user's."""
        return self.inner.transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """As the user's."""
        return self.inner.on_after_batch_transfer(batch, dataloader_idx)

    def state_dict(self) -> dict[str, Any]:
        """As the user's."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the user's."""
        self.inner.load_state_dict(state_dict)

    def teardown(self, stage: str) -> None:
        """As the user's."""
        self.inner.teardown(stage)

    def estimation_batches(self, num_images: int, batch_size: int | None = None) -> Iterator[Inputs]:
        """Yield training inputs for BatchNorm's statistics, the same ones each time.

        Args:
            num_images: how many examples, rounded up to whole batches.
            batch_size: not used: the user's loader has its own.
        """
        if callable(own := getattr(self.inner, "estimation_batches", None)):
            yield from own(num_images, batch_size)
            return
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        yield from first_inputs(self.inner.train_dataloader(), num_images, device)

    def save_split(self, path: Path) -> None:
        """Which images train is the user's affair."""

    def describe(self) -> dict[str, Any]:
        """What the data are, in plain numbers, strings and lists."""
        return {
            "source": type(self.inner).__name__,
            "name": type(self.inner).__name__,
            "num_train": self.num_train,
            "num_val": self.num_val,
            "num_test": self.num_test,
            "num_classes": self.num_classes,
            "image_shape": list(self.image_shape),
        }


RunData = ImageDataModule | TextDataModule | LabelledTextModule | OwnDataModule
"""The data of a run."""


def first_inputs(
    loader: Iterable[Any],
    num_images: int,
    device: torch.device,
    read: Callable[[Any], Any] | None = None,
) -> Iterator[Inputs]:
    """Yield the first training inputs of a loader, the same each time; training's own noise stays as it is.

    Args:
        loader: of batches (inputs, labels), dictionaries, or inputs.
        num_images: how many examples, rounded up to whole batches.
        device: where they go.
        read: what counts of a batch; by default its inputs.

    Raises:
        TypeError: batches are something else.
    """
    left = num_images
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        for batch in loader:
            inputs = (read or _inputs)(batch)
            size = num_examples(inputs)
            if left < num_images and size < 2:
                return
            yield moved(inputs, device)
            left -= size
            if left <= 0:
                return


def _inputs(batch: Any) -> Inputs:
    """Return what a network reads of a batch, of which a list or tuple may have further parts."""
    try:
        inputs = batch[0] if isinstance(batch, list | tuple) else inputs_and_labels(batch)[0]
    except TypeError:
        inputs = None
    if not isinstance(inputs, Tensor | Mapping):
        raise TypeError(
            "BatchNorm statistics are taken from batches (images, labels), dictionaries or images, got "
            f"{type(batch).__name__}: give the data module a method estimation_batches(num_images, "
            "batch_size) that yields images"
        )
    return inputs  # type: ignore[return-value]


def build(settings: own_code.Own, seed: int, channels_last: bool) -> RunData:
    """Make the data module that the user named; one of ours is taken as it is.

    Args:
        settings: made from what the user gave.
        seed: offered as an argument.
        channels_last: the same.
    """
    made = own_code.call(settings.spec, "data", seed=seed, channels_last=channels_last)
    ours = ImageDataModule | TextDataModule | LabelledTextModule
    return made if isinstance(made, ours) else OwnDataModule(made, settings.said)


def _size(loader: Any) -> int:
    """Return the number of examples of a loader, or of its batches where it does not know."""
    if loader is None:
        return 0
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):
        try:
            return len(loader)
        except TypeError:
            return sum(1 for _ in loader)
