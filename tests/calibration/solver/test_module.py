import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse as sp
import torch

pl = pytest.importorskip("pytorch_lightning")

from sparsereg.calibration.problem import CalibrationProblem  # noqa: E402
from sparsereg.calibration.reading.synthetic import synthetic_problem  # noqa: E402
from sparsereg.calibration.solver.calibration import Settings, calibrate  # noqa: E402
from sparsereg.calibration.solver.module import CalibrationModule  # noqa: E402
from sparsereg.calibration.solver.pruning import PruningSchedule  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended"),
]


def survey(seed=0, targets=30, households=300):
    rng = np.random.default_rng(seed)
    matrix = rng.lognormal(size=(targets, households)) * (rng.random((targets, households)) < 0.2)
    initial = rng.lognormal(sigma=0.5, size=households) * 100
    targets = matrix @ initial * rng.lognormal(0, 0.1, targets)
    return CalibrationProblem(sp.csr_array(matrix), targets, initial)


def trainer(path, **more):
    off = dict.fromkeys(
        ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
    )
    options = {"max_epochs": -1, "accelerator": "cpu", "devices": 1, "default_root_dir": path, **off}
    return pl.Trainer(**{**options, **more})


@pytest.mark.parametrize("method", ["pruning", "hard_concrete"])
def test_trainer_gives_what_the_call_gives(tmp_path, method):
    problem = survey()
    module = CalibrationModule(problem, 25, steps=4, settings=Settings(method=method, epochs=100))
    run = trainer(tmp_path)
    run.fit(module)
    assert run.global_step == len(module.calibration.history) > 1
    assert {"loss", "mean_are", "kept"} <= set(run.logged_metrics)
    expected = calibrate(problem, 25, method=method, epochs=100)
    assert np.array_equal(module.result().weights, expected.weights)


@pytest.mark.parametrize("method", ["pruning", "hard_concrete"])
def test_resume_from_a_checkpoint(tmp_path, method):
    problem, settings = survey(), Settings(method=method, epochs=100)
    first = CalibrationModule(problem, 25, steps=2, settings=settings)
    short = trainer(tmp_path, max_steps=2)
    short.fit(first)
    short.save_checkpoint(tmp_path / "half.ckpt")
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert state["calibration"]["method"] == method
    second = CalibrationModule(problem, 25, steps=2, settings=settings)
    trainer(tmp_path).fit(second, ckpt_path=tmp_path / "half.ckpt")
    expected = calibrate(problem, 25, method=method, epochs=100)
    assert np.array_equal(second.result().weights, expected.weights)


METHODS = ("pruning", "hard_concrete")
QUICK = PruningSchedule(stages=5, sweeps=5, first_sweeps=5, swap_rounds=1, swap_parts=2)


def share_of_work(rank, world, path):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=world
    )
    for method in METHODS:
        result = calibrate(survey(households=100), 40, method=method, epochs=30, schedule=QUICK)
        np.save(f"{path}/{method}-{rank}.npy", result.weights)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_targets_shared_out_to_two_processes(tmp_path):
    torch.multiprocessing.spawn(share_of_work, (2, str(tmp_path)), nprocs=2)
    problem = survey(households=100)
    random = calibrate(problem, 40, method="random").loss
    for method in METHODS:
        weights = [np.load(tmp_path / f"{method}-{rank}.npy") for rank in range(2)]
        assert np.array_equal(weights[0], weights[1])
        assert (weights[0] > 0).sum() == 40
        errors = (problem.estimates(weights[0]) - problem.targets) / (np.abs(problem.targets) + 1)
        assert (errors**2).mean() < 0.5 * random


PROGRAM = """
import sys
import numpy as np
import pytorch_lightning as pl
from sparsereg.calibration import synthetic_problem
from sparsereg.calibration.solver.calibration import Settings
from sparsereg.calibration.solver.module import CalibrationModule
from sparsereg.calibration.solver.pruning import PruningSchedule

quick = PruningSchedule(stages=5, sweeps=5, first_sweeps=5, swap_rounds=1, swap_parts=2)
choice = {"lambda_l0": 1.0, "refit": False} if sys.argv[1] == "hard_concrete" else {"schedule": quick}
number = None if sys.argv[1] == "hard_concrete" else 40
settings = Settings(method=sys.argv[1], epochs=100, **choice)
module = CalibrationModule(synthetic_problem(300, 40), number, settings=settings)
off = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
trainer = pl.Trainer(max_epochs=-1, accelerator="cpu", devices=2, strategy="ddp", **off)
trainer.fit(module)
np.save(f"{sys.argv[2]}/{trainer.global_rank}.npy", module.result().weights)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "number", "choice"),
    [
        ("pruning", 40, {"schedule": QUICK, "backend": "torch"}),  # groups prune with torch's steps
        ("hard_concrete", None, {"lambda_l0": 1.0, "refit": False}),
    ],
)
def test_ddp_of_the_trainer_gives_what_one_process_gives(tmp_path, method, number, choice):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), method, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, timeout=300, capture_output=True, env=environment)
    weights = [np.load(tmp_path / f"{rank}.npy") for rank in range(2)]
    assert np.array_equal(weights[0], weights[1])
    expected = calibrate(synthetic_problem(300, 40), number, method=method, epochs=100, **choice).weights
    assert 0 < (expected > 0).sum() < 300
    np.testing.assert_allclose(weights[0], expected, rtol=1e-4, atol=1e-4 * expected.max())
