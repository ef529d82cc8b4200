"""What is told to the user in one line: wrong input, damaged files, outputs that cannot be written."""

import difflib
import re


class InputError(ValueError):
    """The input is wrong. One line: what is wrong, where, what was expected, what to do.

    The scripts print it as ``error: ...`` and end with exit code 2, without a traceback.
    """


class OutputError(OSError):
    """A file cannot be written: the disk is full, say. One line: which one, why, what to do."""


class DamagedFile(ValueError):
    """A file is not as it was written, or something else. The reason, to follow the file's name."""


def interpolation_error(text: str) -> str | None:
    """Return what a resolver said, out of OmegaConf's message around it; None for another message."""
    _, found, said = text.partition("\n")[0].partition(" raised while resolving interpolation: ")
    return said if found else None


def type_error(text: str, key: str | None = None) -> str | None:
    """Return ``key=value: expected ...`` out of OmegaConf's message on a wrong type; None for another one.

    Args:
        text: what OmegaConf says.
        key: the setting; by default the one that OmegaConf names.
    """
    said = r"(?:of type '.*' could not be converted to|of type '.*' is incompatible with|is not a valid)"
    wrong = re.match(rf"Value '(.*)' {said} (.*)", text)
    named = re.search(r"full_key: (\S+)", text)
    key = key or (named.group(1) if named else None)
    if wrong is None or key is None:
        return None
    value, kind = wrong.groups()
    kinds = {"Integer": "an integer", "Float": "a number", "bool (type str)": "true or false"}
    expected = "a number" if "float" in kind else kinds.get(kind, kind)
    return f"{key}={value}: expected {expected}"


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
