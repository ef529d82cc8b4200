"""Which network of a front is handed over: ``pick='latency_ms<=3'``. Nothing here imports PyTorch."""

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsereg.errors import InputError, did_you_mean

COLUMNS = ("size", "sparsity", "parameters", "macs", "latency_ms")
"""Columns of front.csv besides the figures of the task."""
_WITHIN = {"<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True)
class Pick:
    """What the network that is handed over has to keep to.

    Attributes:
        column: of front.csv.
        sign: <= or >=.
        bound: the number.
    """

    column: str
    sign: str
    bound: float

    @classmethod
    def read(cls, text: str, figures: Sequence[str] | None) -> "Pick":
        """Read ``latency_ms<=3``.

        Args:
            text: as the user gave it.
            figures: of the task; None of one that is not known yet.

        Raises:
            InputError: it is no such thing.
        """
        found = re.fullmatch(r"\s*(\w+)\s*(<=|>=)\s*([-+.\deE]+)\s*", text)
        try:
            made = cls(found[1], found[2], float(found[3]))  # type: ignore[index]
        except (TypeError, ValueError):
            raise InputError(
                f"pick={text!r}: expected a column of front.csv and its bound, such as pick='macs<=1e6'"
            ) from None
        if figures is None:
            return made
        known = [*COLUMNS, *(f"{part}_{figure}" for part in ("val", "test") for figure in figures)]
        if made.column not in known:
            raise InputError(
                f"pick={text!r}: front.csv has no column {made.column!r}{did_you_mean(made.column, known)}"
            )
        return made

    def check(self, measured: Mapping[str, bool]) -> None:
        """Raise an InputError if the column will be empty, or there is nothing to choose by.

        Args:
            measured: whether anything is measured on ``val`` and on ``test`` examples.
        """
        said = f"pick={self.column}{self.sign}{self.bound:g}"
        if not measured.get(self.column.partition("_")[0], True):
            where = "validation" if self.column.startswith("val_") else "test"
            raise InputError(f"{said}: nothing is measured on {where} examples here, pick by another column")
        if not any(measured.values()):
            raise InputError(
                f"{said}: the best is picked by validation or test, and neither is measured here"
            )

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of the front keeps to it."""
        return bool(_WITHIN[self.sign](row[self.column], self.bound))

    def miss(self, row: Mapping[str, Any]) -> float:
        """How far a row is from it."""
        return abs(float(row[self.column]) - self.bound)
