"""Households shared out to processes: the weights are those of one process."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from sparsereg.calibration.problem import CalibrationProblem
from sparsereg.calibration.solver import dual_newton
from sparsereg.calibration.solver.calibration import calibrate
from sparsereg.calibration.solver.shared import calibrate_shared

N, T = 600, 25
FEW = 10
HOW = {
    "linear": {},
    "raking": {"distance": "raking"},
    "bounds that bind": {"bounds": (0.9, 1.1)},
    "logit": {"distance": "logit", "bounds": (0.3, 3.0)},
    "limits of weights": {"weight_bounds": (0.5, 60.0)},
}


def survey(seed=0, **more):
    rng = np.random.default_rng(seed)
    matrix = rng.lognormal(size=(T, N)) * (rng.random((T, N)) < 0.3)
    matrix[3] = matrix[1] + matrix[2]  # a sum of others
    initial = rng.lognormal(3, 0.5, N)
    initial[::50] = 0.0
    true = initial * np.clip(1.0 + 0.15 * (matrix[5] - matrix[6]), 0.92, 1.08)
    targets = matrix @ true
    return CalibrationProblem(sp.csr_array(matrix), targets, initial, **more)


def soft():
    rng = np.random.default_rng(5)
    p = survey(1)
    weights = np.where(rng.random(T) < 0.5, np.nan, 3.0)
    tolerances = np.where(rng.random(T) < 0.3, 0.05 * np.abs(p.targets), 0.0)
    return replace(p, target_weights=weights, target_tolerances=tolerances, targets=p.targets * 1.02)


def impossible():
    p = survey(2)
    return replace(p, targets=p.targets * np.where(np.arange(T) == 4, 30.0, 1.0))


def part(p, rank, world):
    own = np.array_split(np.arange(p.num_households), world)[rank]
    return CalibrationProblem(
        p.matrix[:, own], p.targets, p.starting_weights[own], target_weights=p.target_weights,
        target_tolerances=p.target_tolerances,
    )  # fmt: skip


def assert_same(weights, multipliers, p, how):
    theirs = calibrate(p, method="calibrate", **how)
    np.testing.assert_allclose(weights, theirs.weights, rtol=1e-9, atol=1e-9 * theirs.weights.max())
    reach, other = p.matrix.T @ multipliers, p.matrix.T @ theirs.multipliers
    np.testing.assert_allclose(reach, other, rtol=1e-6, atol=1e-7 * np.abs(other).max())


@pytest.mark.parametrize("how", HOW)
def test_one_process_alone(how):
    p = survey()
    ours = calibrate_shared(p, **HOW[how])
    assert_same(ours.weights, ours.multipliers, p, HOW[how])
    np.testing.assert_allclose(ours.estimates, p.targets, rtol=1e-9)
    np.testing.assert_allclose(ours.scale, p.scale)
    exact = calibrate(p, method="calibrate", **HOW[how]).exact
    assert ours.bounds_hit == exact.bounds_hit
    assert ours.bounds_hit > 0 or how != "bounds that bind"


def test_soft_targets_and_tolerances_alone():
    p = soft()
    ours = calibrate_shared(p)
    assert_same(ours.weights, ours.multipliers, p, {})


def test_what_cannot_be_met_gives_way():
    ours = calibrate_shared(impossible(), bounds=(0.5, 2.0))
    assert 4 in ours.gave_way


def test_ratios_are_refused():
    p = survey()
    with pytest.raises(ValueError, match="totals only"):
        calibrate_shared(replace(p, denominators=p.matrix))


def share_of_work(rank, world, path):
    torch.set_num_threads(1)
    place = f"file://{path}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=world)
    cases = [(survey(), how) for how in HOW.values()] + [(soft(), {}), (impossible(), {"bounds": (0.5, 2.0)})]
    for k, (p, how) in enumerate(cases):
        ours = calibrate_shared(part(p, rank, world), **how)
        np.savez(
            f"{path}/{k}-{rank}.npz", **{n: getattr(ours, n) for n in ("weights", "multipliers", "gave_way")}
        )
    dual_newton._MOST_DENSE = FEW
    ours = calibrate_shared(part(survey(), rank, world), distance="raking")
    np.savez(f"{path}/many-{rank}.npz", weights=ours.weights, multipliers=ours.multipliers)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_find_the_weights_of_one(tmp_path, monkeypatch):
    torch.multiprocessing.spawn(share_of_work, (2, str(tmp_path)), nprocs=2)
    for k, (p, how) in enumerate([(survey(), how) for how in HOW.values()] + [(soft(), {})]):
        both = [np.load(tmp_path / f"{k}-{rank}.npz") for rank in range(2)]
        np.testing.assert_array_equal(both[0]["multipliers"], both[1]["multipliers"])
        assert_same(np.concatenate([b["weights"] for b in both]), both[0]["multipliers"], p, how)
    many = [np.load(tmp_path / f"many-{rank}.npz") for rank in range(2)]
    with monkeypatch.context() as patched:
        patched.setattr(dual_newton, "_MOST_DENSE", FEW)  # steps by conjugate gradients, as of 5,000 and more
        weights = np.concatenate([b["weights"] for b in many])
        assert_same(weights, many[0]["multipliers"], survey(), {"distance": "raking"})
    alone = calibrate_shared(impossible(), bounds=(0.5, 2.0))
    both = [np.load(tmp_path / f"{len(HOW) + 1}-{rank}.npz") for rank in range(2)]
    np.testing.assert_array_equal(both[0]["gave_way"], alone.gave_way)
    np.testing.assert_allclose(np.concatenate([b["weights"] for b in both]), alone.weights, rtol=1e-9)
