"""Sweeps go on past a failed job, name it, do not repeat finished jobs, and end with a table and a plot."""

import importlib.util
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf

from sparsereg import cli
from sparsereg.sweep import SweepReport

from .conftest import ROOT


def test_a_sweep_with_a_failed_job_and_its_repetition(run, tiny, images, tmp_path):
    own = shutil.copy(images, tmp_path / "images.npz")
    sweep = ["-m", *tiny, f"data.path={own}", "trainer.max_epochs=1", "lambda_l0=0.5,-1,2"]
    first = run("train", *sweep)
    assert first.code == 2, first.err
    said = "lambda_l0=-1: expected a number >= 0 or null"
    assert first.err.splitlines()[-1] == f"error: 1 of 3 jobs failed: job 1 (lambda_l0=-1): {said}"
    assert first.err.count("\nerror: ") == 1
    table = pd.read_csv(first.path)
    assert table["error"][1] == said
    assert table["status"].tolist() == ["finished", "failed", "finished"]
    assert table["lambda_l0"].tolist()[0] == 0.5
    assert table["exact_sparsity"].notna().tolist() == [True, False, True]
    assert (first.path.parent / "sweep.png").stat().st_size > 1000
    versions = sorted(p.name for p in (first.path.parents[2] / "tblog" / "lightning_logs").iterdir())
    assert versions == ["version_0", "version_1"]

    again = run("train", *sweep)
    assert again.path != first.path
    assert pd.read_csv(again.path)["status"].tolist() == ["skipped", "failed", "skipped"]
    assert "finished before" in again.out
    (tmp_path / "images.npz").touch()
    changed = run("train", *sweep[:-1], "lambda_l0=0.5")
    assert pd.read_csv(changed.path)["status"].tolist() == ["finished"]
    anew = run("train", *sweep[:-1], "lambda_l0=2", "rerun=true")
    assert anew.code == 0, anew.err
    assert pd.read_csv(anew.path)["status"].tolist() == ["finished"]


@pytest.mark.costly
def test_a_sweep_sums_up_what_failed_in_one_line(run, tiny, monkeypatch):
    sweep = ["-m", *tiny, "lambda_l0=-1,-2,-3"]
    wrong = run("train", *sweep)
    assert wrong.code == 2
    *jobs, last = [line for line in wrong.err.splitlines() if line.startswith(("job ", "error:"))]
    assert [j.partition(" error:")[0] for j in jobs] == [f"job {n} (lambda_l0=-{n + 1})" for n in range(3)]
    assert last.startswith("error: 3 of 3 jobs failed: job 0 (lambda_l0=-1): lambda_l0=-1: expected")
    assert last.endswith("; each one's reason is in the column error of sweep.csv")
    assert (
        pd.read_csv(wrong.path)["error"]
        .str.startswith(("lambda_l0=-1:", "lambda_l0=-2:", "lambda_l0=-3:"))
        .all()
    )

    def broken(cfg, folder):
        if cfg.lambda_l0 == -2:
            raise AssertionError("ours")

    monkeypatch.setattr("sparsereg.sweep._go_on", broken)
    ours = run("train", *sweep)
    assert ours.code == 1  # the gravest
    assert "error:" not in {line[:6] for line in ours.err.splitlines()}
    last = ours.err.splitlines()[-1]
    assert last.startswith(
        "failed: 3 of 3 jobs failed: job 1 (lambda_l0=-2): AssertionError: ours (traceback in"
    )


@pytest.mark.slow
def test_a_sweep_of_fine_tuning_and_flags_between_overrides(run, tiny):
    """The checkpoint implies choices in front of -m, where Hydra refuses a second group of overrides."""
    plain = run("train", *tiny, "trainer.max_epochs=1", "without_using_gate=true")
    start = [f"ckpt_path={plain.last}", "resume_training=false", "without_using_gate=false"]
    tuned = run("train", "-m", *start, "trainer.max_epochs=1", "lambda_l0=0.5,2")
    assert tuned.code == 0, tuned.err
    assert pd.read_csv(tuned.path)["lambda_l0"].tolist() == [0.5, 2]
    tested = run("test", f"ckpt_path={plain.last}", "--multirun", "seed=0,1")
    assert tested.code == 0, tested.err
    assert len(pd.read_csv(tested.path)) == 2


@pytest.mark.slow
def test_sweeps_that_start_together_have_folders_of_their_own(tmp_path):
    settings = ["problem.households=300", "problem.targets=60", "plots=false", "tensorboard=false",
                "holdout.groups=null", "num_households=40", "-m", "seed=0,1"]  # fmt: skip
    command = [sys.executable, str(ROOT / "calibrate.py"), *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    sweeps = [
        subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ends = [sweep.communicate()[0].splitlines()[-1] for sweep in sweeps]
    assert [sweep.returncode for sweep in sweeps] == [0, 0]
    tables = {tmp_path / line.removeprefix("results: ") for line in ends}
    assert len(tables) == 2
    assert all(len(pd.read_csv(table)) == 2 for table in tables)


@pytest.mark.costly
def test_a_second_sweep_in_a_named_folder_is_refused(run, tiny, tmp_path):
    sweep = ["-m", *tiny, "trainer.max_epochs=1", "seed=0", "hydra.sweep.dir=mine"]
    assert run("train", *sweep).code == 0
    before = (tmp_path / "mine" / "0" / "job.json").read_text()
    again = run("train", *sweep)
    assert again.code == 2
    assert "error: hydra.sweep.dir=mine holds another sweep" in again.err
    assert (tmp_path / "mine" / "0" / "job.json").read_text() == before


def test_showing_a_configuration_makes_no_folder(run, tmp_path):
    assert run("train", "--cfg", "hydra", "--resolve", "-p", "hydra.sweep.dir").code == 0
    assert not (tmp_path / "outputs").exists()


def test_a_sweep_that_finds_no_room_leaves_no_half_file(run, tiny, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (900, hard))
    try:
        refused = run("train", "-m", *tiny, "lambda_l0=0.5,1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refused.code == 2
    assert list((tmp_path / "outputs" / "train" / "multirun").iterdir()) == []


class Sweeps:
    """What a sweeper was given by each job."""

    def __init__(self, monkeypatch):
        self.values = []
        ended = SweepReport.on_job_end

        def recorded(report, config, job_return, **kwargs):
            self.values.append(job_return.return_value)
            ended(report, config, job_return, **kwargs)

        monkeypatch.setattr(SweepReport, "on_job_end", recorded)


@pytest.mark.costly
def test_a_sweeper_gets_the_objective(run, tiny, monkeypatch):
    sweeps = Sweeps(monkeypatch)
    sweep = ["-m", *tiny, "trainer.max_epochs=1", "logger=none"]
    table = pd.read_csv(run("train", *sweep, "lambda_l0=0.5,-1").path)
    assert sweeps.values[0] == table["val_acc"][0]
    assert sweeps.values[1] != sweeps.values[1]  # NaN: that job has failed
    run("train", *sweep, "lambda_l0=0.5", "objective=[test_acc,parameters]")  # finished before
    assert sweeps.values[2] == [table["test_acc"][0], table["parameters"][0]]
    refused = run("train", *tiny, "objective=accuracy")
    assert refused.code == 2
    assert "objective=accuracy: expected one of val_acc, test_acc" in refused.err
    small = ["problem.households=300", "problem.targets=60", "plots=false", "tensorboard=false"]
    calibrated = run("calibrate", "-m", *small, "num_households=40", "seed=0", "objective=max_are")
    assert sweeps.values[-1] == pytest.approx(pd.read_csv(calibrated.path)["max_are"][0], rel=1e-14)


@pytest.mark.costly
def test_a_job_that_is_started_again_goes_on(run, tiny, tmp_path, monkeypatch):
    """As SLURM does with a job that it has taken the machine from: the same job in the same folder."""
    started = run("train", *tiny, "trainer.max_epochs=1", "lambda_l0=2")
    job = tmp_path / "sweep" / "0"
    job.mkdir(parents=True)
    lost = str(tmp_path / "lost.ckpt")  # of a second start that came to no checkpoint
    (job / "begun.json").write_text(json.dumps({"checkpoints": [str(started.last.absolute()), lost]}))
    sweep = ["-m", *tiny, "trainer.max_epochs=2", "hydra.sweep.dir=sweep", "lambda_l0=2"]
    again = run("train", *sweep)
    assert again.code == 0, again.err
    results = json.loads(Path(json.loads((job / "job.json").read_text())["results"]).read_text())
    assert results["epochs"] == 2
    assert results["resumed"]["epoch"] == 1
    assert len(json.loads((job / "begun.json").read_text())["checkpoints"]) == 3


def test_a_launcher_that_is_not_installed_is_named(run, tiny):
    if importlib.util.find_spec("hydra_plugins") is not None:
        pytest.skip("there are plugins here")
    outcome = run("train", "-m", *tiny, "hydra/launcher=joblib", "lambda_l0=1,2")
    assert outcome.code == 2
    assert "hydra/launcher=joblib needs a plugin of Hydra: pip install hydra-joblib-launcher" in outcome.err


def test_a_job_is_what_a_worker_process_can_be_sent(tmp_path, monkeypatch):
    """Launchers pickle it; the copy knows the folder of the sweep and what the arguments imply."""
    made, given = {"outputs": "outputs/of/this/sweep"}, ["-m", "lambda_l0=1,2"]
    task = cli._Task("train", cli.settings_of, ["train.py"], given, made, ["model=own"])
    monkeypatch.setattr(cli, "_implied", [])
    OmegaConf.clear_resolver("sweep_folder")
    pickle.loads(pickle.dumps(task))
    assert OmegaConf.create({"dir": "${sweep_folder:outputs}"}).dir == "outputs/of/this/sweep"
    assert cli._implied == ["model=own"]
