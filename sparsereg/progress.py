"""Bars and lines of long work in the library; those of training are Lightning's."""

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_SHOWN: ContextVar[bool] = ContextVar("shown", default=True)


class _Silent:
    """In place of a bar."""

    def update(self, steps: int) -> None:
        """Say nothing."""

    def set_postfix_str(self, text: str) -> None:
        """Say nothing."""


@contextmanager
def showing(shown: bool) -> Iterator[None]:
    """Show no bars within this context if that is not wanted here, or was not outside.

    Args:
        shown: False for none.

    Example:
        >>> with showing(False), bar("repair", "layer", 3) as steps:
        ...     steps.update(1)
    """
    before = _SHOWN.set(shown and _SHOWN.get())
    try:
        yield
    finally:
        _SHOWN.reset(before)


@contextmanager
def bar(what: str, unit: str, total: int | None) -> Iterator[Any]:
    """A bar, where stderr is a terminal and tqdm is installed; none within another one.

    Args:
        what: is done.
        unit: of what is counted.
        total: how many there are; None if nobody knows.
    """
    with _shown(desc=what, unit=unit, total=total) as steps:
        yield steps


@contextmanager
def doing(what: str) -> Iterator[None]:
    """A line that says what is being done, until it is done, where a bar would be shown.

    Args:
        what: is done.
    """
    with _shown(desc=what, bar_format="{desc} ..."):
        yield


@contextmanager
def _shown(**settings: Any) -> Iterator[Any]:
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # of the processes on this machine
    if not (_SHOWN.get() and first) or importlib.util.find_spec("tqdm") is None:
        yield _Silent()
        return
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    root = logging.getLogger()
    messages = [root] if any(isinstance(h, logging.StreamHandler) for h in root.handlers) else []
    with contextlib.ExitStack() as stack:
        steps = stack.enter_context(tqdm(**settings, leave=False, disable=None))
        if not steps.disable:
            stack.enter_context(logging_redirect_tqdm(messages))  # messages stand above the bar
            stack.enter_context(showing(False))
        yield steps
