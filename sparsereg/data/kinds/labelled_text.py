"""``data=labelled_text``."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sparsereg.data.kind import Data
from sparsereg.settings import NOT_NEGATIVE, again, setting, within

if TYPE_CHECKING:
    from sparsereg.data.own import RunData


@dataclass(frozen=True)
class LabelledTextData(Data):
    """Texts with a class each, byte by byte: a CSV file, or PATH/CLASS/*; see docs/tasks.md."""

    TASKS: ClassVar[tuple[str, ...]] = ("text_classification",)
    MODEL: ClassVar[tuple[str, ...]] = ("model=gpt",)

    name: str = again(Data, "name", "labelled_text")
    path: str | None = setting(
        None,
        "a CSV file with a header, or a folder: PATH/CLASS/*, or PATH/train/CLASS/* and PATH/test/CLASS/*",
    )
    text: str = setting("text", "column of the texts, of a CSV file")
    label: str = setting("label", "column of the classes, of a CSV file")
    context: int = setting(256, "bytes that are read of each text", within("[1, 65536]", "an integer"))
    batch_size: int = again(Data, "batch_size", 32)
    eval_batch_size: int = again(Data, "eval_batch_size", 64)
    test_size: float = setting(
        0.1, "share of the texts that tests, where the folder does not say it", within("(0, 0.5]", "a share")
    )
    max_memory_gb: float = setting(1.0, "texts are held in memory, up to this size (GiB)", NOT_NEGATIVE)


def module(seed: int, channels_last: bool, **keys: Any) -> "RunData":
    """Return its data module."""
    from sparsereg.data.labelled_text import LabelledTextModule, TextClasses

    source = TextClasses(**{key: keys.pop(key) for key in ("path", "text", "label", "max_memory_gb")})
    return LabelledTextModule(source, seed=seed, **keys)


DATA = LabelledTextData
