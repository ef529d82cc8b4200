"""Checks of arguments that say what was expected and what came."""

import math
import numbers
import os
from typing import Any

from sparsereg.errors import InputError


def check_count(name: str, value: Any, at_most: int | None = None) -> int:
    """Check that a value is an integer >= 1 and return it as an int (NumPy's integers are accepted).

    Args:
        name: the argument's name, for the error.
        value: what came.
        at_most: largest value allowed, >= 1.

    Raises:
        ValueError: it is not.
    """
    if not _is(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    if at_most is not None and value > at_most:
        raise ValueError(f"{name} must be at most {at_most}, got {value!r}")
    return int(value)


def check_probability(name: str, value: Any) -> float:
    """Check that a value lies strictly between 0 and 1 and return it as a float.

    Raises:
        ValueError: it does not.
    """
    if not _is(value, numbers.Real) or not 0 < value < 1:
        raise ValueError(f"{name} must be a probability in (0, 1), got {value!r}")
    return float(value)


def check_below_one(name: str, value: Any) -> float:
    """Check that a threshold lies in [0, 1) and return it as a float.

    Raises:
        ValueError: it does not.
    """
    if not _is(value, numbers.Real) or not 0 <= value < 1:
        raise ValueError(f"{name} must be a number in [0, 1), got {value!r}")
    return float(value)


def check_share(name: str, value: Any) -> float:
    """Check that a value lies in [0, 1] and return it as a float.

    Raises:
        ValueError: it does not.
    """
    if not _is(value, numbers.Real) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a share in [0, 1], got {value!r}")
    return float(value)


def check_not_negative(name: str, value: Any) -> float:
    """Check that a value is a finite number >= 0 and return it as a float.

    Raises:
        ValueError: it is not.
    """
    if not _is(value, numbers.Real) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a number >= 0, got {value!r}")
    return float(value)


def check_positive(name: str, value: Any) -> float:
    """Check that a value is a finite number > 0 and return it as a float.

    Raises:
        ValueError: it is not.
    """
    if not _is(value, numbers.Real) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a number > 0, got {value!r}")
    return float(value)


LARGEST = 1e100
"""Size of the largest weights and totals: products of larger ones are beyond all numbers."""


def check_finite(name: str, value: Any) -> float:
    """Check that a value is a finite number and return it as a float.

    Raises:
        ValueError: it is not.
    """
    if not _is(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is a number of that kind; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def check_memory(needed: float, what: str) -> None:
    """Refuse what cannot fit into this machine, before anything of it is made.

    Args:
        needed: bytes.
        what: needs them, for the message.

    Raises:
        InputError: the machine has less.
    """
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not on every system
        return
    if needed > memory:
        has = f"this machine has {memory / 2**30:,.1f} GiB"
        raise InputError(f"{what} need at least {needed / 2**30:,.1f} GiB of memory, {has}")
