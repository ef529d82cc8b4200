"""``data=text``."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sparsereg.data.kind import Data
from sparsereg.settings import NOT_NEGATIVE, Contradiction, again, count, setting, within

if TYPE_CHECKING:
    from sparsereg.data.own import RunData


@dataclass(frozen=True)
class TextData(Data):
    """A text, byte by byte: windows, and the byte that comes next at each place; see docs/tasks.md."""

    TASKS: ClassVar[tuple[str, ...]] = ("language_model",)
    MODEL: ClassVar[tuple[str, ...]] = ("model=gpt",)

    name: str = again(Data, "name", "text")
    path: str | None = setting(
        None,
        "a file, or a folder of files; null: the sources of Python's standard library, found where it is",
    )
    pattern: str = setting("*", "of the names of the files of a folder, such as *.txt")
    context: int = setting(128, "bytes of a window", within("[1, 65536]", "an integer"))
    train_windows: int = setting(1024, "windows of an epoch, drawn anew in each", count())
    eval_windows: int | None = setting(
        512, "windows of validation and of test at most, spread evenly; null: all", count()
    )
    batch_size: int = again(Data, "batch_size", 16)
    eval_batch_size: int = again(Data, "eval_batch_size", 64)
    val_size: float = setting(
        0.05, "share of the bytes that validates; 0: none", within("[0, 0.5]", "a share")
    )
    test_size: float = setting(0.05, "share of the bytes that tests", within("(0, 0.5]", "a share"))
    max_memory_gb: float = setting(
        1.0,
        "files are read into memory up to this size (GiB); a single larger one stays on the disk",
        NOT_NEGATIVE,
    )

    def check(self) -> None:
        """Something is left to train on."""
        if self.val_size + self.test_size >= 0.9:
            raise Contradiction(
                f"{{}}val_size={self.val_size:g} and {{}}test_size={self.test_size:g} leave too little"
                " to train on"
            )


def module(seed: int, channels_last: bool, **keys: Any) -> "RunData":
    """Return its data module."""
    from sparsereg.data.corpus import TextSource
    from sparsereg.data.text import TextDataModule

    source = TextSource(**{key: keys.pop(key) for key in ("path", "pattern", "max_memory_gb")})
    return TextDataModule(source, seed=seed, **keys)


DATA = TextData
