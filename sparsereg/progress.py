"""Bars of long work in the library; those of training are Lightning's."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Silent:
    """In place of a bar."""

    def update(self, steps: int) -> None:
        """Say nothing."""

    def set_postfix_str(self, text: str) -> None:
        """Say nothing."""


@contextmanager
def bar(what: str, unit: str, total: int | None, shown: bool) -> Iterator[Any]:
    """A bar, where there is a terminal and tqdm is installed, of work that takes more than a second.

    Args:
        what: is done.
        unit: of what is counted.
        total: how many there are; None if nobody knows.
        shown: False for none at all.

    Example:
        >>> with bar("repair", "layer", 3, shown=False) as steps:
        ...     steps.update(1)
    """
    if not shown or importlib.util.find_spec("tqdm") is None:
        yield _Silent()
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit=unit, leave=False, delay=1, disable=None) as steps:
        yield steps
