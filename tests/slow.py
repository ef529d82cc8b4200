"""Which cases of a test run fast, where many are alike."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slowly(cases: Iterable[Any], slow: Collection[Any]) -> list[Any]:
    """All cases for ``parametrize``; those that are named run among the slow tests only."""
    return [pytest.param(case, marks=pytest.mark.slow) if case in slow else case for case in cases]
