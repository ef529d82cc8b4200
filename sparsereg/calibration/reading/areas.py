"""From files to areas: the column, the draw or the crosswalk that says who may stand for which area."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from sparsereg.calibration.areas import AreaProblem, Placement
from sparsereg.calibration.config import Area, Targets
from sparsereg.calibration.reading.book import Book, Page
from sparsereg.calibration.reading.cells import numbers, row
from sparsereg.calibration.reading.households import (
    TARGET_TEXTS,
    Source,
    TargetTable,
    initial_weights,
    target_table,
)
from sparsereg.calibration.reading.missing import Missing
from sparsereg.calibration.reading.sources import ALL_TARGETS
from sparsereg.calibration.reading.tables import read_table, unique_ids
from sparsereg.calibration.reading.unknown_column import require_column
from sparsereg.errors import InputError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd

_UNKNOWN = ("tolerance", "hard", "scale", "of", "of_where")
"""Columns of targets that areas do not know: their targets are totals."""


def read_areas(
    choice: Mapping[str, Any], area: Area, missing: Missing, seed: int, asked: Targets = ALL_TARGETS
) -> AreaProblem:
    """Read households, targets with their areas, and who may stand for which area.

    Args:
        choice: The keys of configs/problem/households.yaml.
        area: Which households stand for which area.
        missing: What becomes of missing values in measures: "error" or "zero".
        seed: Of the draw of clones.
        asked: Which rows of the table of targets count.

    Raises:
        InputError: A file is missing or wrong, an area has targets and no household, or something else does
            not fit; the message names the place.
    """
    written = {"decimal": choice["decimal"], "encoding": choice["encoding"]}
    file, id = str(choice["households"]), choice["id"]
    households = read_table(file, [area.column] if area.column else False, id=id, **written)
    told = str(choice["targets"])
    book = Book(read_table(told, (*TARGET_TEXTS, "area"), **written), told, **asked.rules)
    page = book.page(next(iter(asked.years), None))
    targets, names = _with_areas(page, told, area.mode != "independent")
    weights = initial_weights(households, choice["weight"], file)
    there = np.ones(len(households), dtype=bool) if weights is None else weights > 0
    everybody, households = households, households[there].reset_index(drop=True)
    ids = unique_ids(households, id, file)
    ids = np.flatnonzero(there) if ids is None else ids
    tree = {} if area.groups is None else _tree(area.groups, written)
    _refuse_weightless(area.column, everybody, there, file, targets, names)
    placement = _placement(area, households, ids, file, targets, names, set(tree.values()), seed, written)
    groups, parent = _hierarchy(tree, placement.areas, area.groups)
    measure, first = _measures(targets)
    zero = missing.columns("zero", [m for m in targets.measures if m])
    matrix, hints = Source(households, file, zero=tuple(zero)).totals(_only(targets, first))
    for k in np.flatnonzero(np.diff(matrix.indptr) == 0).tolist():
        raise InputError(f"{targets.place(int(first[k]))}: no household touches it: {hints[k]}")
    place = {name: i for i, name in enumerate((*placement.areas, *groups))}
    problem = AreaProblem(
        measures=matrix,
        initial_weights=np.ones(len(ids)) if weights is None else weights[there],
        placement=placement,
        targets=targets.values,
        measure=measure,
        area=np.array([place[name] if name else -1 for name in names]),
        names=targets.names,
        measure_names=tuple(_named(targets, int(i)) for i in first),
        ids=ids,
        groups=groups,
        parent=parent,
        prices=None if targets.weights is None else np.nan_to_num(targets.weights, nan=1.0),
        standard_errors=_standard_errors(page, told),
        levels=targets.labels.get("level"),
    )
    _refuse_unreachable(problem, targets)
    return problem


def _refuse_weightless(
    column: str | None,
    households: pd.DataFrame,
    there: np.ndarray,
    file: str,
    targets: TargetTable,
    names: list[str],
) -> None:
    """Refuse an area in which households live, none of them with a weight."""
    if column is None or column not in households.columns:
        return
    homes = households[column].astype(str).str.strip()
    lost = set(homes[~there]) - set(homes[there])
    for i, name in enumerate(names):
        if name in lost:
            number = int((homes == name).sum())
            raise InputError(
                f"{targets.place(i)}: all {number:,} households of {file} with {column} == {name!r} have the"
                " weight 0: give them one, or leave the target out"
            )


def _with_areas(page: Page, file: str, soft: bool) -> tuple[TargetTable, list[str]]:
    """Check a table of targets, and return the area of each; "" is the nation."""
    table = page.table
    require_column(table, "area", file, "which area each target is of; empty: the nation")
    for column in _UNKNOWN if soft else ("weight", *_UNKNOWN):
        if column in table.columns and (table[column].notna() & (table[column].astype(str) != "")).any():
            how = "totals" if soft else "totals that are met exactly"
            raise InputError(f"{file}: targets of areas are {how}: leave the column {column!r} empty")
    names = [str(name).strip() for name in table["area"].fillna("")]
    if not any(names):
        raise InputError(f"{file}: no target has an area: leave area.* out, or fill the column 'area'")
    plain = table.drop(columns=["area", *(c for c in table.columns if c == "standard_error")])
    return target_table(plain, file, rows=page.rows, known=page.known, areas=names), names


def _standard_errors(page: Page, file: str) -> np.ndarray | None:
    """Standard errors of the targets, 0 where the cell is empty; None without the column."""
    if "standard_error" not in page.table.columns:
        return None
    errors = numbers(page.table, "standard_error", file, allow_missing=True, rows=page.rows)
    if (errors < 0).any():
        at = int(np.flatnonzero(errors < 0)[0])
        raise InputError(
            f"{file}: standard_error must be >= 0, but it is {errors[at]:g} in row {row(int(page.rows[at]))}"
        )
    return np.asarray(np.nan_to_num(errors))


def _tree(path: str, written: Mapping[str, Any]) -> dict[str, str]:
    """Read which group each area, and each group, is part of; "" is the nation."""
    table = read_table(path, ["area", "parent"], **written)
    for column in ("area", "parent"):
        require_column(table, column, path, "area.groups has area,parent; an empty parent is the nation")
    names, parents = (
        [str(cell).strip() for cell in table[column].fillna("")] for column in ("area", "parent")
    )
    first: dict[str, int] = {}
    for i, name in enumerate(names):
        if not name:
            raise InputError(f"{path} row {row(i)}: the area is empty")
        if name in first:
            raise InputError(
                f"{path}: the area {name!r} is there twice, in rows {row(first[name])}, {row(i)}"
            )
        first[name] = i
    return dict(zip(names, parents, strict=True))


def _hierarchy(
    tree: Mapping[str, str], areas: tuple[str, ...], path: str | None
) -> tuple[tuple[str, ...], np.ndarray | None]:
    """Names of the groups, and what each area and group is part of."""
    if path is None:
        return (), None
    lost = next((name for name in areas if name not in tree), None)
    if lost is not None:
        raise InputError(f"{path}: the area {lost!r} has no row{did_you_mean(lost, list(tree))}")
    mixed = next((name for name in areas if name in tree.values()), None)
    if mixed is not None:
        raise InputError(f"{path}: {mixed!r} is an area, and cannot be the parent of others")
    groups = tuple(dict.fromkeys(name for name in (*tree, *tree.values()) if name and name not in areas))
    above = tuple(dict.fromkeys(tree.values()))
    strange = next((name for name in groups if name not in above), None)
    if strange is not None:
        hint = did_you_mean(strange, list(areas))
        raise InputError(f"{path}: {strange!r} is neither an area nor the parent of one{hint}")
    place = {"": -1} | {name: i for i, name in enumerate((*areas, *groups))}
    return groups, np.array([place[tree.get(name, "")] for name in (*areas, *groups)])


def _placement(
    area: Area,
    households: pd.DataFrame,
    ids: np.ndarray,
    file: str,
    targets: TargetTable,
    names: list[str],
    groups: Set[str],
    seed: int,
    written: Mapping[str, Any],
) -> Placement:
    """Who may stand for which area; every area of a target is one."""
    if area.column is not None:
        require_column(households, area.column, file, "area.column")
        missing = households[area.column].isna() | (households[area.column].astype(str).str.strip() == "")
        if missing.any():
            at = int(np.flatnonzero(missing)[0])
            raise InputError(f"{file}: {area.column} is missing for household {ids[at]}, row {row(at)}")
        placement = Placement.by_home(households[area.column].astype(str).str.strip().to_numpy())
        where = f"household of {file} has {area.column} =="
    elif area.crosswalk is not None:
        placement = _crosswalk(area.crosswalk, ids, file, written)
        where = f"row of {area.crosswalk} has the area"
    else:
        known = tuple(dict.fromkeys(name for name in names if name and name not in groups))
        assert area.clones is not None
        try:
            sizes = _sizes(targets, names, known)
            return Placement.by_clones(known, sizes, len(ids), area.clones, seed)
        except ValueError as error:
            raise InputError(f"area.clones={area.clones}: {error}") from None
    for i, name in enumerate(names):
        if name and name not in placement.areas and name not in groups:
            hint = did_you_mean(name, [*placement.areas, *groups])
            raise InputError(f"{targets.place(i)}: no {where} {name!r}{hint}")
    return placement


def _crosswalk(path: str, ids: np.ndarray, file: str, written: Mapping[str, Any]) -> Placement:
    """Read area, share and optionally id; without id each area has its share of every household."""
    import pandas as pd

    table = read_table(path, ["area"], id="id", **written)
    for column in ("area", "share"):
        require_column(table, column, path, "a crosswalk has area,share and optionally id")
    shares, areas = numbers(table, "share", path), table["area"].astype(str).str.strip()
    wrong = np.flatnonzero(~((shares > 0) & (shares <= 1)))
    if len(wrong):
        at = int(wrong[0])
        raise InputError(f"{path}: share must lie in (0, 1], got {shares[at]:g} in row {row(at)}")
    keys = ["area"] if "id" not in table.columns else ["id", "area"]
    twice = np.flatnonzero(table.assign(area=areas).duplicated(keys))
    if len(twice):
        at = int(twice[0])
        whose = "" if keys == ["area"] else f", id {table['id'].iloc[at]}"
        raise InputError(
            f"{path}: the area {areas.iloc[at]!r}{whose} is there twice, the second in row {row(at)}"
        )
    names, place = np.unique(areas.to_numpy(dtype=str), return_inverse=True)
    if keys == ["area"]:
        whole = float(shares.sum())
        if abs(whole - 1.0) > 1e-6:
            raise InputError(f"{path}: shares must add up to 1, got {whole:.9g}")
        by_area = np.empty(len(names))
        by_area[place] = shares
        return Placement(tuple(names.tolist()), by_area)
    household = pd.Index(ids.astype(str)).get_indexer(table["id"].astype(str))
    if (household < 0).any():
        at = int(np.flatnonzero(household < 0)[0])
        raise InputError(f"{path}: id {table['id'].iloc[at]} in row {row(at)} is not in {file}")
    sums = np.bincount(household, weights=shares, minlength=len(ids))
    wrong = np.flatnonzero(np.abs(sums - 1.0) > 1e-6)
    if len(wrong):
        at = int(wrong[0])
        said = "it is not there" if sums[at] == 0 else f"they add up to {sums[at]:.9g}"
        more = f" ({len(wrong):,} such households)" if len(wrong) > 1 else ""
        raise InputError(f"{path}: shares of each household must add up to 1; of {ids[at]} {said}{more}")
    matrix = sp.csr_array((shares, (place, household)), shape=(len(names), len(ids)))
    return Placement(tuple(names.tolist()), matrix)


def _sizes(targets: TargetTable, names: list[str], areas: tuple[str, ...]) -> np.ndarray:
    """How large areas are: the first total > 0 that all of them ask for.

    Raises:
        ValueError: there is none.
    """
    measure, first = _measures(targets)
    for k in range(len(first)):
        values = {names[i]: float(targets.values[i]) for i in np.flatnonzero(measure == k) if names[i]}
        if len(values) == len(areas) and min(values.values()) > 0:
            return np.array([values[area] for area in areas])
    raise ValueError("no total above 0 is asked for by every area: their sizes are not known")


def _measures(targets: TargetTable) -> tuple[np.ndarray, np.ndarray]:
    """Index of what each target sums, and the first target of each."""
    index: dict[tuple[str, str], int] = {}
    measure, first = np.empty(len(targets.names), dtype=np.int64), []
    for i, key in enumerate(zip(targets.measures, targets.wheres, strict=True)):
        if key not in index:
            index[key] = len(index)
            first.append(i)
        measure[i] = index[key]
    return measure, np.array(first)


def _only(targets: TargetTable, chosen: np.ndarray) -> TargetTable:
    """Some targets, as totals."""

    def some(texts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(texts[i] for i in chosen)

    return replace(
        targets, names=some(targets.names), values=targets.values[chosen], measures=some(targets.measures),
        wheres=some(targets.wheres), units=some(targets.units), of=(), of_wheres=(), of_units=(),
        rows=np.array([targets.row(int(i)) for i in chosen]), labels={},
    )  # fmt: skip


def _named(targets: TargetTable, i: int) -> str:
    what = targets.measures[i] or "households"
    return f"{what} where {targets.wheres[i]}" if targets.wheres[i] else what


def _refuse_unreachable(problem: AreaProblem, targets: TargetTable) -> None:
    """Refuse a target that is not 0 of which no household of its area has anything."""
    for place, own in enumerate(problem.by_place):
        there = np.zeros(problem.num_households)
        for area in problem.leaves(place):
            there[problem.placement.of(area, problem.num_households)[0]] = 1.0
        if there.all():
            continue
        touched = abs(problem.measures[problem.measure[own]]) @ there
        for i in own[(touched == 0) & (problem.targets[own] != 0)][:1]:
            whose = problem.place_name(int(i))
            raise InputError(
                f"{targets.place(int(i))}: no household that may stand for {whose!r} has any of it"
            )
