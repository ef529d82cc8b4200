"""Areas, groups and the nation at once: the weights are those of one large problem with all pairs."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp

from sparsereg.calibration import CalibrationProblem, calibrate
from sparsereg.calibration.solver import joint
from sparsereg.calibration.solver.clones import prune_clones
from sparsereg.calibration.solver.joint import Joint, calibrate_together
from tests.calibration.test_areas import AREAS, MEASURES, N, nested, placements, problem, with_more


def as_one(p, price):
    """All pairs as the columns of one matrix, the targets soft."""
    rows = p.measures.toarray().astype(np.float64)
    blocks, initial, where = [], [], []
    for area in range(4):
        households, shares = p.placement.of(area, N)
        block = np.zeros((len(p.targets), len(households)))
        for place in p.chain(area):
            for i in p.by_place[place]:
                block[i] = rows[p.measure[i], households]
        blocks.append(block)
        initial.append(p.initial_weights[households] * shares)
        where.append(households)
    weights = np.concatenate(initial)
    of_place = [sum(float(initial[a].sum()) for a in p.leaves(k)) for k in range(len(p.places) + 1)]
    prices = price * np.array([of_place[a] for a in p.area]) / weights.sum()
    if p.prices is not None:
        prices = prices * p.prices
    whole = CalibrationProblem(sp.csr_array(np.hstack(blocks)), p.targets, weights, target_weights=prices)
    return whole, np.cumsum([len(h) for h in where])[:-1]


@pytest.mark.parametrize("kind", placements())
@pytest.mark.parametrize(
    ("distance", "bounds"),
    [("linear", (0.95, 1.03)), ("raking", None), ("logit", (0.1, 8.0)), ("linear", None)],
)
def test_weights_are_those_of_all_pairs_at_once(kind, distance, bounds):
    p = nested(kind, 1.03)
    whole, cuts = as_one(p, 50.0)
    theirs = calibrate(whole, method="calibrate", distance=distance, bounds=bounds)
    ours = list(calibrate_together(p, distance, bounds, price=50.0))
    assert [a.area for a in ours] == [0, 1, 2, 3]
    for area, weights in zip(ours, np.split(theirs.weights, cuts), strict=True):
        np.testing.assert_allclose(area.weights, weights, rtol=1e-6, atol=1e-9 * weights.max())
        assert ((area.weights > 0) | (area.initial > 0)).all()
    hit = sum(a.bounds_hit for a in ours)
    assert hit == theirs.exact.bounds_hit
    assert hit > 0 or bounds is None or distance == "logit"


@pytest.mark.parametrize("kind", placements())
def test_measures_that_are_sums_of_others_are_not_stored(kind, monkeypatch):
    p = nested(kind, 1.03)
    rows = p.measures.toarray()
    share = np.random.default_rng(3).integers(0, 2, N)
    rows[3], rows[4] = np.where(share, rows[0], 0), np.where(share, 0, rows[0])
    rows[1] = np.where(rows[0] == 0, rows[1], 0)
    rows[5] = rows[0] + rows[1]
    p = replace(p, measures=sp.csr_array(rows))
    ours = Joint(p, "raking", None, 50.0)
    ours.solve()
    stored = ours._rows.by_target
    assert stored.shape[0] == MEASURES - 2
    assert stored.nnz == p.measures.nnz - np.count_nonzero(rows[[0, 5]])
    monkeypatch.setattr(joint, "find_nesting", lambda *_: None)
    theirs = Joint(p, "raking", None, 50.0)
    theirs.solve()
    assert theirs._rows.by_target.shape[0] == MEASURES
    for one, other in zip(ours.weights(), theirs.weights(), strict=True):
        np.testing.assert_allclose(one.weights, other.weights, rtol=1e-9, atol=1e-9 * other.weights.max())
        np.testing.assert_allclose(one.estimates, other.estimates, rtol=1e-9)


def test_levels_meet_in_the_middle():
    p = nested("clones", 1.1)
    alone = nested("clones", 1.0)
    far, near = (
        max(float(a.errors.max()) for a in calibrate_together(q, price=1e4)) for q in (p, alone)
    )  # totals that agree are met, those that do not are missed at every level
    assert near < 1e-3 < 1e-2 < far < 0.2


def test_prices_of_targets_count():
    p = nested("a crosswalk", 1.2)
    prices = np.where(p.area == -1, 1.0, 1e-6)
    dear = replace(p, prices=prices)
    total = np.zeros(N)
    for a in calibrate_together(dear, price=1e3):
        total[a.households] += a.weights
    wanted = p.targets[p.area == -1]
    np.testing.assert_allclose(p.measures[p.measure[p.area == -1]] @ total, wanted, rtol=1e-3)
    whole, cuts = as_one(dear, 1e3)
    theirs = np.split(calibrate(whole, method="calibrate").weights, cuts)
    for a, w in zip(calibrate_together(dear, price=1e3), theirs, strict=True):
        np.testing.assert_allclose(a.weights, w, rtol=1e-6, atol=1e-8 * w.max())


def test_a_measure_of_the_nation_only_and_an_area_without_targets():
    p = problem(
        placements()["clones"], without=[(1, m) for m in range(MEASURES)] + [(a, 5) for a in range(4)]
    )
    total = float((p.measures[[5]] @ p.initial_weights)[0])
    p = with_more(p, [(-1, 5, 1.1 * total)])
    whole, cuts = as_one(p, 100.0)
    theirs = np.split(calibrate(whole, method="calibrate").weights, cuts)
    for a, w in zip(calibrate_together(p), theirs, strict=True):
        np.testing.assert_allclose(a.weights, w, rtol=1e-6, atol=1e-8 * w.max())
        assert len(a.errors) == (0 if a.area == 1 else 5)


def test_two_rows_that_are_the_same_do_not_hurt():
    p = nested("at home")
    rows = sp.csr_array(sp.vstack([p.measures, p.measures[[0]], 2 * p.measures[[1]]]))
    more = [(a, MEASURES, float(p.targets[(p.area == a) & (p.measure == 0)][0])) for a in range(4)]
    more += [(-1, MEASURES + 1, 2 * float(p.targets[(p.area == -1) & (p.measure == 1)][0]))]
    labels = (*p.measure_names, "again", "twice")
    p = with_more(p, more, measures=rows, measure_names=labels)
    run = Joint(p)
    run.solve()
    assert run._look(run.multipliers).error <= 1e-6


def test_nothing_of_the_size_of_all_targets_is_held(monkeypatch):
    p, seen = nested("clones"), []
    factor = joint.sl.cho_factor
    monkeypatch.setattr(joint.sl, "cho_factor", lambda a, **how: (seen.append(len(a)), factor(a, **how))[1])
    list(calibrate_together(p))
    assert max(seen) == MEASURES < len(p.targets)


@pytest.mark.costly
@pytest.mark.parametrize("kind", ["clones", "everybody everywhere", "a crosswalk"])
@pytest.mark.parametrize("most", [1, 2])
def test_exactly_so_many_pairs_are_kept(kind, most):
    p = nested(kind)
    total, places, pairs = np.zeros(N), np.zeros(N, dtype=int), 0
    for a in prune_clones(p, 240, most):
        assert (a.weights >= 0).all()
        total[a.households] += a.weights
        places[a.households] += a.weights > 0
        pairs += int((a.weights > 0).sum())
        assert (a.weights > 0).sum() >= 10
        assert a.errors.max() < 0.05
    assert pairs == 240
    assert places.max() <= most
    nation = p.area == -1
    np.testing.assert_allclose(p.measures[p.measure[nation]] @ total, p.targets[nation], rtol=0.02)


@pytest.mark.costly
def test_the_same_seed_keeps_the_same_pairs():
    p = nested("clones")
    first, again, other = ([a.weights for a in prune_clones(p, 100, 2, seed=s)] for s in (1, 1, 2))
    np.testing.assert_array_equal(np.concatenate(first), np.concatenate(again))
    assert (np.concatenate(first) != np.concatenate(other)).any()


def test_drawn_pairs_stand_for_everybody():
    from sparsereg.calibration.solver.clones import _drawn

    p = nested("everybody everywhere")
    run = Joint(p)
    run.solve()
    whole = sum(float(a.weights.sum()) for a in run.weights())
    sums = [
        float(_drawn(run, 2, number, seed).weights.sum()) for number in (10**9, 500) for seed in range(20)
    ]
    for some in (sums[:20], sums[20:]):
        assert np.mean(some) == pytest.approx(whole, abs=4 * np.std(some) / np.sqrt(20))
        assert np.std(some) < 0.2 * whole


def test_more_pairs_than_there_are():
    p = problem(placements()["at home"])
    with pytest.raises(ValueError, match="keep=801: there are 800 pairs of area and household"):
        prune_clones(p, 801, 3)
    assert len(AREAS) == 4
