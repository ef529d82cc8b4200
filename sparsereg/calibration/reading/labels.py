"""Labels of codes, as statistics programs keep them: ``sex == 'female'`` where the file holds 2."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sparsereg.calibration.reading.cells import shown
from sparsereg.calibration.reading.conditions import (
    And,
    Column,
    Compare,
    Condition,
    Constant,
    In,
    Not,
    Or,
)
from sparsereg.errors import InputError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd

_KEY = "sparsereg labels"


@dataclass(frozen=True)
class Labels:
    """What the codes of one column are called.

    Args:
        codes: By label, every code that is called so.
        missing: Labels of codes that stand for missing values.
    """

    codes: Mapping[str, tuple[float | str, ...]] = field(default_factory=dict)
    missing: Collection[str] = ()


def labels_of(table: pd.DataFrame) -> dict[str, Labels]:
    """Return the labels of a table that was read, by column."""
    return dict(table.attrs.get(_KEY, {}))


def with_labels(table: pd.DataFrame, labels: Mapping[str, Labels]) -> pd.DataFrame:
    """Give a table its labels and return it."""
    if labels:
        table.attrs[_KEY] = dict(labels)
    return table


def in_codes(condition: Condition, labels: Mapping[str, Labels]) -> Condition:
    """Return a condition with codes in the place of labels.

    Args:
        condition: As it was written; a text that is compared with a column of labelled numbers is a label.
        labels: By column.

    Raises:
        InputError: there is no such label, or it is that of a missing value.
    """
    match condition:
        case Compare(Column(name) as column, "==" | "!=" as op, Constant(kind="text") as label) if (
            name in labels
        ):
            codes = _codes(labels[name], name, label)
            found: Condition = In(column, codes) if len(codes) > 1 else Compare(column, "==", codes[0])
            return found if op == "==" else Not(found)
        case In(Column(name) as column, values) if name in labels:
            return In(column, tuple(c for v in values for c in _codes(labels[name], name, v)))
        case Not(item):
            return Not(in_codes(item, labels))
        case And(items) | Or(items):
            return type(condition)(tuple(in_codes(item, labels) for item in items))
    return condition


def _codes(labels: Labels, column: str, value: Constant) -> tuple[Constant, ...]:
    """Return the codes that a constant means: itself, unless it is a label."""
    text = value.value
    if value.kind != "text" or not isinstance(text, str):
        return (value,)
    if text in labels.missing:
        raise InputError(
            f"names {shown(text)}, which is the label of a missing value of {column!r}:"
            f" write `{column} is missing`"
        )
    codes = labels.codes.get(text)
    if codes is None:
        known = {code for codes in labels.codes.values() for code in codes}
        if any(isinstance(code, str) for code in known):  # a column of texts: others than labelled ones occur
            return (value,)
        raise InputError(
            f"compares {column!r} with {shown(text)}, which is no label of it{_hint(text, labels)}"
        )
    return tuple(Constant(code, "text" if isinstance(code, str) else "number") for code in codes)


def _hint(text: str, labels: Labels) -> str:
    return did_you_mean(text, list(labels.codes))


def grouped(by_code: Mapping[Any, str], missing: Collection[Any] = ()) -> Labels:
    """Return labels from what each code is called.

    Args:
        by_code: Label of each code.
        missing: Codes that stand for missing values.
    """
    codes: dict[str, tuple[float | str, ...]] = {}
    for code, label in by_code.items():
        if code not in missing:
            codes[str(label).strip()] = (*codes.get(str(label).strip(), ()), code)
    gone = {str(label).strip() for code, label in by_code.items() if code in missing}
    return Labels(codes, frozenset(gone - codes.keys()))
