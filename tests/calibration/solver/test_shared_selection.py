"""Gates and everybody's best weights with the households shared out: what one process finds."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sparsereg.calibration import CalibrationProblem, calibrate, synthetic_problem
from sparsereg.calibration.config import PruningSchedule, Settings
from sparsereg.calibration.solver.shared_pruning import largest_of_all
from sparsereg.calibration.solver.shared_selection import select_shared

HOW = {
    "gates": ("hard_concrete", {"lambda_l0": 0.02, "epochs": 200}),
    "gates by share": ("hard_concrete", {"lambda_l0": 0.3, "lambda_scale": "mean", "epochs": 150, "seed": 3}),
    "everybody": ("all", {}),
    "within a ratio": ("all", {"max_weight_ratio": 1.5}),
    "gates alone": ("hard_concrete", {"lambda_l0": 0.02, "epochs": 60, "refit": False}),
}


def survey():
    p = synthetic_problem(1500, 60, disagreement=0.01)
    weights = p.starting_weights.copy()
    weights[::97] = 0.0
    return replace(p, initial_weights=weights, parent=None)


def part(p, rank, world):
    own = np.array_split(np.arange(p.num_households), world)[rank]
    return CalibrationProblem(p.matrix[:, own], p.targets, p.starting_weights[own])


def assert_same(weights, p, method, how):
    theirs = calibrate(CalibrationProblem(p.matrix, p.targets, p.starting_weights), method=method, **how)
    np.testing.assert_array_equal(weights > 0, theirs.weights > 0)
    exact = how.get("refit", True)
    np.testing.assert_allclose(weights, theirs.weights, rtol=1e-9 if exact else 1e-4, atol=1e-9 * exact)


@pytest.mark.costly
@pytest.mark.parametrize("name", HOW)
def test_one_process_alone(name):
    method, how = HOW[name]
    p = survey()
    ours = select_shared(part(p, 0, 1), Settings(method=method, **how), method)
    assert_same(ours.weights, p, method, how)
    np.testing.assert_allclose(ours.estimates, p.estimates(ours.weights), rtol=1e-9)
    assert (ours.bounds_hit > 0) == ("max_weight_ratio" in how)
    if method == "hard_concrete":
        assert p.num_targets < (ours.weights > 0).sum() < 0.9 * p.num_households


@pytest.mark.parametrize(
    ("settings", "method", "message"),
    [
        ({"loss": "mape"}, "all", "loss must be relative or mse"),
        ({"hold_total": True}, "all", "hold_total"),
        ({"chi2": 0.0}, "all", "chi2 must be > 0"),
        ({}, "random", "must be one of all, hard_concrete, pruning"),
        ({}, "pruning", "num_households belongs to method='pruning'"),
        ({"lambda_l0": 1e9, "epochs": 100}, "hard_concrete", "shut every household"),
    ],
)
def test_what_is_not_known_is_refused(settings, method, message):
    with pytest.raises(ValueError, match=message):
        select_shared(part(survey(), 0, 1), Settings(**settings), method)


NUMBER = {"exactly": {}, "within a ratio": {"max_weight_ratio": 40.0}}
QUICK = PruningSchedule(stages=15, sweeps=15, first_sweeps=20, swap_rounds=8, swap_parts=3)


def assert_as_good(weights, estimates, p, num_kept, how):
    """So many are kept, the totals are theirs, and errors are about those that one process reaches."""
    alone = CalibrationProblem(p.matrix, p.targets, p.starting_weights)
    theirs = calibrate(alone, num_kept, schedule=QUICK, **how)
    assert (weights > 0).sum() == num_kept
    assert not weights[p.starting_weights == 0].any()
    np.testing.assert_allclose(estimates, p.estimates(weights), rtol=1e-9)
    ours = np.abs(p.estimates(weights) / p.targets - 1).mean()
    assert ours < 1.5 * theirs.diagnostics["mean_are"] + 1e-4
    if "max_weight_ratio" in how:
        assert (weights <= how["max_weight_ratio"] * p.starting_weights * (1 + 1e-9)).all()


@pytest.mark.costly
@pytest.mark.parametrize("name", NUMBER)
@pytest.mark.parametrize("num_kept", [60, 700])
def test_a_number_of_households_in_one_process(name, num_kept):
    p, how = survey(), NUMBER[name]
    ours = select_shared(part(p, 0, 1), Settings(schedule=QUICK, **how), "pruning", num_kept)
    assert_as_good(ours.weights, ours.estimates, p, num_kept, how)


def test_more_households_than_there_are():
    with pytest.raises(ValueError, match="num_households must be at most 1484"):
        select_shared(part(survey(), 0, 1), Settings(), "pruning", 1485)


def test_the_largest_are_found_by_their_bits():
    values = np.array([0.0, 3.0, 1e-310, 3.0, 7.5, 0.0, 1.0])
    assert largest_of_all(values, 2).tolist() == [1, 4]
    assert largest_of_all(values, 5).tolist() == [1, 2, 3, 4, 6]
    assert largest_of_all(values, 6).tolist() == [0, 1, 2, 3, 4, 6]
    assert largest_of_all(values, 7).tolist() == list(range(7))


def share_of_work(rank, world, path):
    torch.set_num_threads(1)
    place = f"file://{path}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=world)
    for k, (method, how) in enumerate(HOW.values()):
        ours = select_shared(part(survey(), rank, world), Settings(method=method, **how), method)
        np.savez(f"{path}/{k}-{rank}.npz", weights=ours.weights, estimates=ours.estimates)
    for name, how in NUMBER.items():
        settings = Settings(schedule=QUICK, **how)
        ours = select_shared(part(survey(), rank, world), settings, "pruning", 60)
        np.savez(f"{path}/{name}-{rank}.npz", weights=ours.weights, estimates=ours.estimates)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_find_the_weights_of_one(tmp_path):
    torch.multiprocessing.spawn(share_of_work, (2, str(tmp_path)), nprocs=2)
    for k, (method, how) in enumerate(HOW.values()):
        both = [np.load(tmp_path / f"{k}-{rank}.npz") for rank in range(2)]
        np.testing.assert_array_equal(both[0]["estimates"], both[1]["estimates"])
        assert_same(np.concatenate([b["weights"] for b in both]), survey(), method, how)
    for name, how in NUMBER.items():
        both = [np.load(tmp_path / f"{name}-{rank}.npz") for rank in range(2)]
        np.testing.assert_array_equal(both[0]["estimates"], both[1]["estimates"])
        weights = np.concatenate([b["weights"] for b in both])
        assert_as_good(weights, both[0]["estimates"], survey(), 60, how)
