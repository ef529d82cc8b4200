"""What is told to the user in one line: wrong input, damaged files, outputs that cannot be written."""

import contextlib
import difflib
import logging
import re
from collections.abc import Iterator
from pathlib import Path

SAID = {1: "failed", 2: "error", 3: "short"}
"""How the lines start that tell what an exit code is about."""


class InputError(ValueError):
    """The input is wrong. One line: what is wrong, where, what was expected, what to do.

    The scripts print it as ``error: ...`` and end with exit code 2, without a traceback.
    """


class OutputError(OSError):
    """A file cannot be written: the disk is full, say. One line: which one, why, what to do."""


class FellShort(Exception):
    """A run has ended and its files are written, but it did not reach what was required of it.

    The scripts print a line for each shortfall and end with exit code 3.

    Args:
        results: the path of its results.json.
        shortfalls: one line each.
    """

    def __init__(self, results: Path, shortfalls: list[str]) -> None:
        super().__init__("; ".join(shortfalls))
        self.results, self.shortfalls = results, shortfalls


class DamagedFile(ValueError):
    """A file is not as it was written, or something else. The reason, to follow the file's name."""


def interpolation_error(text: str) -> str | None:
    """Return what a resolver said, out of OmegaConf's message around it; None for another message."""
    _, found, said = text.partition("\n")[0].partition(" raised while resolving interpolation: ")
    return said if found else None


def nearest(word: str, known: list[str]) -> str:
    """Return ``: did you mean 'x'?`` for the closest known word, or nothing."""
    close = _closest(word, known)
    return f": did you mean {close!r}?" if close else ""


def did_you_mean(word: str, known: list[str]) -> str:
    """Return ``; did you mean 'x'?`` for the closest known word, else a short list of what there is."""
    close = _closest(word, known)
    if close:
        return f"; did you mean {close!r}?"
    return f"; there are {', '.join(known[:12])}{', ...' if len(known) > 12 else ''}"


def _closest(word: str, known: list[str]) -> str | None:
    """Return the closest known word: as it stands, in other letters, or by the last part of dotted keys."""
    for spelling in (str, str.casefold, lambda text: text.rpartition(".")[2]):
        by_spelling = {spelling(k): k for k in known}
        match = difflib.get_close_matches(spelling(word), list(by_spelling), n=1, cutoff=0.6)
        if match:
            return by_spelling[match[0]]
    return None


def one_line(text: str) -> str:
    """Fold a message into one line."""
    return re.sub(r"\s+", " ", text).strip()


@contextlib.contextmanager
def wrong_input() -> Iterator[None]:
    """Within this context a ValueError is the user's: it becomes an InputError.

    The scripts build their objects from the settings inside it and train outside of it. Messages wait until
    all is well, so that none stands before the error.
    """
    root = logging.getLogger()
    handlers, waiting = root.handlers[:], _Waiting()
    root.handlers[:] = [waiting]
    try:
        yield
    except (InputError, OSError):
        waiting.records.clear()
        raise
    except ValueError as error:
        waiting.records.clear()
        raise InputError(one_line(str(error))) from error
    finally:
        root.handlers[:] = handlers
        for record in waiting.records:
            root.handle(record)


class _Waiting(logging.Handler):
    """Keeps messages for later."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.records.append(record)
