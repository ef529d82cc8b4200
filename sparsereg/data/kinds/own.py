"""``data._target_=``: a data module of the user's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sparsereg.data.kind import Data
from sparsereg.own_code import Own
from sparsereg.settings import again, setting

if TYPE_CHECKING:
    from sparsereg.data.own import RunData


@dataclass(frozen=True)
class OwnData(Own, Data):
    """Data of yours: data._target_=my_module.Data data.KEY=VALUE; docs/extending.md.

    A LightningDataModule whose batches are (inputs, labels) or dictionaries. All keys are its arguments.
    """

    GROUP: ClassVar[str] = "data"
    OTHERS: ClassVar[str | None] = "arguments"

    name: str = again(Data, "name", "own", key=False)
    batch_size: int = again(Data, "batch_size", 128, key=False)
    eval_batch_size: int = again(Data, "eval_batch_size", 250, key=False)
    val_size: int | float = again(Data, "val_size", 0.1, key=False)
    split_seed: int = again(Data, "split_seed", 42, key=False)
    _target_: str | None = setting(None, "package.module.Class, of a LightningDataModule")
    arguments: Mapping[str, Any] = setting(dict, "of that class")


def module(seed: int, channels_last: bool, *, settings: OwnData) -> "RunData":
    """Return what the user named, as a run asks for its data."""
    from sparsereg.data.own import build

    return build(settings, seed, channels_last)


DATA = OwnData
