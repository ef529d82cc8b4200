"""Areas with weights of their own: each one's are those of its own calibration; placements add up."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp

from sparsereg.calibration import CalibrationProblem, calibrate
from sparsereg.calibration.areas import AreaProblem, Placement
from sparsereg.calibration.solver.areas import calibrate_areas

AREAS = ("north", "south", "east", "west")
N, MEASURES = 800, 6


def placements():
    rng = np.random.default_rng(1)
    size = np.array([0.1, 0.2, 0.3, 0.4])
    uneven = rng.dirichlet(np.ones(4), N).T
    return {
        "everybody everywhere": Placement(AREAS, size),
        "at home": Placement.by_home(np.array(AREAS)[rng.integers(0, 4, N)]),
        "clones": Placement.by_clones(AREAS, size, N, 2),
        "a crosswalk": Placement(AREAS, sp.csr_array(uneven)),
    }


def problem(placement, seed=0, spread=0.3, without=()):
    rng = np.random.default_rng(seed)
    measures = sp.csr_array(
        ((rng.random((MEASURES, N)) < 0.5) * rng.lognormal(size=(MEASURES, N))).astype(np.float32)
    )
    weights = rng.lognormal(3, 0.4, N)
    pairs = [(a, m) for a in range(4) for m in range(MEASURES) if (a, m) not in without]
    targets = []
    for a, m in pairs:
        households, shares = placement.of(a, N)
        noise = rng.lognormal(0, spread, len(households))
        targets.append(float((measures[[m]][:, households] @ (weights[households] * shares * noise))[0]))
    area, measure = (np.array(column) for column in zip(*pairs, strict=True))
    names = tuple(f"{AREAS[a]} {m}" for a, m in pairs)
    labels = tuple(f"measure {m}" for m in range(MEASURES))
    return AreaProblem(
        measures, weights, placement, np.array(targets), measure, area, names, labels, np.arange(N)
    )


@pytest.mark.parametrize("kind", placements())
@pytest.mark.parametrize(
    ("distance", "bounds"), [("linear", (0.2, 4.0)), ("raking", None), ("logit", (0.1, 8.0))]
)
def test_weights_are_those_of_each_area_by_itself(kind, distance, bounds):
    p = problem(placements()[kind], without=[(1, 2)])
    for ours in calibrate_areas(p, distance, bounds):
        alone = CalibrationProblem(
            p.measures[p.measure[ours.targets]][:, ours.households], p.targets[ours.targets], ours.initial
        )
        theirs = calibrate(alone, method="calibrate", distance=distance, bounds=bounds)
        np.testing.assert_allclose(ours.weights, theirs.weights, rtol=1e-9)
        np.testing.assert_allclose(ours.multipliers, theirs.multipliers, rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(ours.estimates, p.targets[ours.targets], rtol=1e-10)
        assert ours.bounds_hit == theirs.exact.bounds_hit


def test_all_areas_come_in_order_and_an_area_without_targets_keeps_its_weights():
    placement = placements()["clones"]
    p = problem(placement, without=[(2, m) for m in range(MEASURES)])
    ours = list(calibrate_areas(p))
    assert [a.area for a in ours] == [0, 1, 2, 3]
    np.testing.assert_array_equal(ours[2].weights, ours[2].initial)


@pytest.mark.parametrize("kind", ["at home", "everybody everywhere"])
def test_what_cannot_be_met_gives_way_in_its_area_only(kind):
    p = problem(placements()[kind])
    targets = p.targets.copy()
    targets[p.area == 1] *= 50
    hard = AreaProblem(
        p.measures,
        p.initial_weights,
        p.placement,
        targets,
        p.measure,
        p.area,
        p.names,
        p.measure_names,
        p.ids,
    )
    for area in calibrate_areas(hard, "linear", (0.5, 2.0)):
        assert (len(area.gave_way) > 0) == (area.area == 1)
        assert (area.weights >= 0.5 * area.initial * (1 - 1e-12)).all()
        assert (area.weights <= 2.0 * area.initial * (1 + 1e-12)).all()


@pytest.mark.parametrize("kind", placements())
def test_shares_of_a_household_add_up_to_one(kind):
    placement = placements()[kind]
    total = np.zeros(N)
    for area in range(4):
        households, shares = placement.of(area, N)
        assert (np.diff(households) > 0).all()
        total[households] += shares
    np.testing.assert_allclose(total, 1.0)


def test_clones_are_drawn_by_size_without_repetition():
    placement = Placement.by_clones(("a", "b", "c"), np.array([8.0, 1.0, 1.0]), 40_000, 1, seed=3)
    counts = np.diff(placement.shares.indptr) / 40_000
    np.testing.assert_allclose(counts, [0.8, 0.1, 0.1], atol=0.01)
    twice = Placement.by_clones(("a", "b", "c"), np.array([8.0, 1.0, 1.0]), 500, 3)
    assert twice.shares.nnz == 1_500
    np.testing.assert_allclose(twice.shares.sum(axis=0), 1.0)
    assert (twice.shares != Placement.by_clones(("a", "b", "c"), np.ones(3), 500, 3).shares).nnz == 0
    with pytest.raises(ValueError, match="clones must be from 1 to the number of areas, 3, got 4"):
        Placement.by_clones(("a", "b", "c"), np.ones(3), 10, 4)


def with_more(p, more, **others):
    """A problem with further targets: (place, measure, value)."""
    place, measure, value = (np.array(column) for column in zip(*more, strict=True))
    names = tuple(f"place {a} {m}" for a, m in zip(place, measure, strict=True))
    return replace(
        p, targets=np.append(p.targets, value), measure=np.append(p.measure, measure),
        area=np.append(p.area, place), names=(*p.names, *names), **others,
    )  # fmt: skip


def nested(kind, factor=1.0, measures=range(MEASURES), seed=0):
    """Areas in two groups (north and south; the others), and the nation; totals times a factor."""
    p = problem(placements()[kind], seed)
    first, second = ([0, 1], [2, 3])
    more = []
    for m in measures:
        sums = [
            float(p.targets[(p.measure == m) & np.isin(p.area, areas)].sum()) for areas in (first, second)
        ]
        more += [(4, m, sums[0] * factor), (5, m, sums[1] / factor), (-1, m, sum(sums) * factor)]
    return with_more(p, more, groups=("upper", "lower"), parent=np.array([4, 4, 5, 5, -1, -1]))


def test_targets_that_do_not_add_up_are_named_and_multiplied_to_the_nation():
    p = problem(placements()["at home"])
    nation = float(p.targets[p.measure == 3].sum()) * 1.1
    with_nation = with_more(p, [(-1, 3, nation)])
    (found,) = with_nation.disagreements()
    assert (with_nation.measure[found.whole], found.asked) == (3, nation)
    assert found.total == pytest.approx(nation / 1.1)
    mended = with_nation.reconciled()
    assert mended.disagreements() == []
    sums = sum(float(a.estimates[p.measure[a.targets] == 3][0]) for a in calibrate_areas(mended))
    assert sums == pytest.approx(nation)


def test_levels_are_multiplied_from_the_nation_down():
    p = nested("at home", 1.1, [0, 2])
    assert len(p.sums()) == 6
    assert len(p.disagreements()) == 6
    mended = p.reconciled()
    assert mended.disagreements() == []
    nation = p.area == -1
    np.testing.assert_array_equal(mended.targets[nation], p.targets[nation])
    moved = mended.targets[p.is_of_area] / p.targets[p.is_of_area]
    assert moved[p.measure[p.is_of_area] == 1] == pytest.approx(1.0)


def test_standard_errors_say_who_moves():
    p = nested("at home", 1.05, [0])
    errors = np.where(p.area == 4, 0.0, np.abs(p.targets) * 0.02)  # the group "upper" is known exactly
    mended = replace(p, standard_errors=errors).reconciled("standard_errors")
    assert mended.disagreements(1e-9) == []
    np.testing.assert_array_equal(mended.targets[p.area == 4], p.targets[p.area == 4])
    # The smallest moves over standard errors: no other ones that add up are smaller.
    some = np.flatnonzero(p.measure == 0)
    move = lambda t: np.square((t - p.targets)[some][errors[some] > 0] / errors[some][errors[some] > 0]).sum()
    rng, best = np.random.default_rng(0), move(mended.targets)
    for _ in range(20):
        other = mended.targets.copy()
        a, b = rng.normal(size=2) * errors[some].max() * 0.1
        other[(p.area == 2) & (p.measure == 0)] += a
        other[(p.area == 3) & (p.measure == 0)] += b
        other[(p.area == 5) & (p.measure == 0)] += a + b
        other[(p.area == -1) & (p.measure == 0)] += a + b
        assert move(other) > best
    with pytest.raises(ValueError, match="have no standard error by which they could give way"):
        replace(p, standard_errors=np.zeros(len(errors))).reconciled("standard_errors")
    with pytest.raises(ValueError, match="fill standard_error"):
        p.reconciled("standard_errors")


def test_a_part_without_a_target_is_replaced_by_its_own_parts():
    p = nested("clones", 1.1, [0])
    without = np.flatnonzero(p.area != 5)
    fewer = replace(
        p, targets=p.targets[without], measure=p.measure[without], area=p.area[without],
        names=tuple(p.names[i] for i in without),
    )  # fmt: skip
    sums = {fewer.place_name(s.whole): {fewer.place_name(i) for i in s.parts} for s in fewer.sums()}
    assert sums == {"": {"upper", "east", "west"}, "upper": {"north", "south"}}


def test_groups_in_a_circle_are_refused():
    p = problem(placements()["at home"])
    with pytest.raises(ValueError, match="'upper' is a part of itself|'lower' is a part of itself"):
        replace(p, groups=("upper", "lower"), parent=np.array([4, 4, 5, 5, 5, 4]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shares": np.array([0.1, 0.2, 0.3, 0.5])}, "shares must add up to 1 over the areas, got 1.1"),
        ({"shares": np.array([0.5, 0.5])}, "a row for each of 4 areas"),
        ({"shares": np.array([-0.5, 0.5, 0.5, 0.5])}, "in \\(0, 1\\]"),
        ({"areas": ("a", "a", "b", "c")}, "different names"),
    ],
)
def test_wrong_placements(change, message):
    with pytest.raises(ValueError, match=message):
        Placement(**({"areas": AREAS, "shares": np.array([0.1, 0.2, 0.3, 0.4])} | change))


def test_the_same_total_of_an_area_twice_is_refused():
    p = problem(placements()["at home"])
    with pytest.raises(ValueError, match="'north 0' and 'north 1' ask for the same total of one area"):
        AreaProblem(
            p.measures, p.initial_weights, p.placement, p.targets, p.measure * (p.measure != 1), p.area,
            p.names, p.measure_names, p.ids,
        )  # fmt: skip


def test_one_target_out_of_reach_leaves_the_others_of_its_area_met():
    p = problem(placements()["at home"], spread=0.05)
    impossible = int(np.flatnonzero((p.area == 1) & (p.measure == 2))[0])
    p = replace(p, targets=p.targets * np.where(np.arange(len(p.targets)) == impossible, 40.0, 1.0))
    ours = list(calibrate_areas(p, bounds=(0.5, 2.0)))
    assert [a.gave_way.tolist() for a in ours] == [[], [impossible], [], []]
    assert max(np.delete(a.errors, a.targets == impossible).max() for a in ours) < 1e-6


def test_areas_are_shared_out_once_each_and_evenly():
    shares = sp.csr_array(np.repeat(np.eye(5), [1, 1, 6, 1, 1], axis=1))
    for placement in (Placement(tuple("abcde"), shares), Placement(tuple("abcde"), np.full(5, 0.2))):
        for number in (1, 2, 3, 8):
            runs = placement.shared_out(number)
            assert len(runs) == number
            assert [a for run in runs for a in run] == list(range(5))
    assert Placement(tuple("abcde"), shares).shared_out(2) in (
        [range(3), range(3, 5)],
        [range(2), range(2, 5)],
    )
