"""Sweeps (``-m``): each job leaves a job.json, a finished one is not done twice, a table and a plot end it.

A job is known by the digest of its resolved configuration. When a sweep is started again, jobs that
finished in an earlier one with the same configuration are taken over; ``rerun=true`` does them again.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import sparsereg
from sparsereg import interruption, own_code
from sparsereg.errors import SAID, FellShort, InputError, interpolation_error
from sparsereg.files import write_json
from sparsereg.sweep_plot import draw
from sparsereg.table_file import write_table


def run_job(
    name: str,
    run: Callable[[DictConfig], Path],
    cfg: DictConfig,
    swept: list[str],
    explained: Callable[[BaseException], tuple[int, list[str]]],
) -> "float | list[float]":
    """Run one job of a sweep; a failure is written down and does not stop the sweep.

    A job that was cut off and is started again by its launcher (by SLURM, say) goes on from its last
    checkpoint.

    Args:
        name: the script.
        run: does the work and returns the path of its results.json.
        cfg: the job's configuration.
        swept: those of its overrides that make it another job than the others.
        explained: from an error to its exit code and what is said about it.

    Returns:
        What ``objective`` names of its results, for the sweeper; NaN where there is none.
    """
    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.sweep.dir) / str(hydra_cfg.job.num)
    job: dict[str, Any] = {
        "job": int(hydra_cfg.job.num),
        "overrides": list(hydra_cfg.overrides.task),
        "swept": swept,
    }
    if (folder / "job.json").exists():  # in a folder that the user named
        taken = f"hydra.sweep.dir={folder.parent} holds another sweep; name a new folder, or none"
        print(f"{SAID[2]}: {taken}", file=sys.stderr, flush=True)
        sys.exit(2)
    try:
        job["digest"] = digest(name, cfg)
    except OmegaConfBaseException as error:
        _note(folder, job, "failed", explained(InputError(interpolation_error(str(error)) or str(error))))
        return _objective(cfg, None)
    done = None if cfg.get("rerun") else _finished(folder.parent.parent, job["digest"])
    if done is not None:
        print(f"{_named(job)}: finished before, in {done}", flush=True)
        write_json(folder / "job.json", {**job, "status": "skipped", "results": str(done)})
        return _objective(cfg, done)
    results: Path | None = None
    try:
        _go_on(cfg, folder)
        results = run(cfg)
    except FellShort as error:
        results = error.results
        _note(folder, {**job, "results": str(results)}, "short", explained(error))
    except Exception as error:
        interruption.check()
        _note(folder, job, "failed", explained(error))
    else:
        write_json(folder / "job.json", {**job, "status": "finished", "results": str(results)})
    finally:
        interruption.continue_with(lambda given: None)  # the sweep, which takes over what has finished
    return _objective(cfg, results)


def _note(folder: Path, job: dict[str, Any], status: str, explained: tuple[int, list[str]]) -> None:
    """Say at once that a job did not end well, and write it down; the sweep sums it up at its end."""
    code, error = explained[0], "; ".join(explained[1])
    print(f"{_named(job)} {SAID[code]}: {error}", file=sys.stderr, flush=True)
    write_json(folder / "job.json", {**job, "status": status, "error": error, "code": code})


def _named(job: dict[str, Any]) -> str:
    return f"job {job['job']} ({' '.join(job['swept'])})" if job["swept"] else f"job {job['job']}"


def _objective(cfg: DictConfig, results: Path | None) -> "float | list[float]":
    """Return the numbers that ``objective`` names, for Hydra's sweeper; NaN where there are none."""
    found = {} if results is None else _read(results)
    asked = cfg.get("objective") or found.get("objective")
    names = [asked] if asked is None or isinstance(asked, str) else list(asked)
    values = [found.get(str(name)) for name in names]
    numbers = [float("nan") if v is None else float(v) for v in values]
    return numbers[0] if asked is None or isinstance(asked, str) else numbers


BEGUN = "begun.json"
"""In the folder of a job: the checkpoints that its runs write."""


def note_checkpoint(checkpoint: Path) -> None:
    """Note in the folder of a job of a sweep where the run that has begun keeps its last checkpoint."""
    hydra_cfg = HydraConfig.get()
    if hydra_cfg.mode != RunMode.MULTIRUN:
        return
    file = Path(hydra_cfg.sweep.dir) / str(hydra_cfg.job.num) / BEGUN
    write_json(file, {"checkpoints": [*_read(file).get("checkpoints", []), str(checkpoint.absolute())]})


def _go_on(cfg: DictConfig, folder: Path) -> None:
    """Let a job that was cut off, and is started again in the same folder, resume its run."""
    left = [path for path in _read(folder / BEGUN).get("checkpoints", []) if Path(path).is_file()]
    if left:
        print(f"goes on from {left[-1]}", flush=True)
        OmegaConf.update(cfg, "ckpt_path", left[-1])
        if "resume_training" in cfg:
            OmegaConf.update(cfg, "resume_training", True)


def checkpoint_of_job(number: int) -> str:
    """Return the tested checkpoint of an earlier job of this sweep: ``${checkpoint_of_job:0}`` in a file.

    Raises:
        InputError: there is no sweep, or that job has not finished.
    """
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        raise InputError(f"this run starts from job {number} of a sweep: give -m")
    job = _read(Path(HydraConfig.get().sweep.dir) / str(number) / "job.json")
    if not job.get("results"):
        raise InputError(f"this run starts from job {number} of its sweep, which has not finished")
    return str(_read(Path(job["results"]))["checkpoint"])


def digest(name: str, cfg: DictConfig) -> str:
    """Return a digest of what determines a run: script, version, resolved configuration, its input files.

    Input files, and those of the user's own code, are known by size and time of change, so that an edited
    table is calibrated again.
    """
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    for key in ("rerun", "objective"):
        plain.pop(key, None)
    code = [file for path in own_code.source_files(plain) for file in _files(path)]
    text = json.dumps([name, sparsereg.__version__, plain, _files(plain), code], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _files(node: Any) -> list[tuple[str, int, int]]:
    """Return (path, bytes, time of change) of every file that a configuration names."""
    if isinstance(node, dict | list):
        values = node.values() if isinstance(node, dict) else node
        return [file for value in values for file in _files(value)]
    if isinstance(node, str) and len(node) < 4096 and Path(node).is_file():
        status = Path(node).stat()
        return [(node, status.st_size, status.st_mtime_ns)]
    return []


def _finished(sweeps: Path, wanted: str) -> Path | None:
    """Return the results.json of a finished job with that digest, if one is there."""
    for file in sorted(sweeps.glob("*/*/job.json")):
        job = _read(file)
        if job.get("digest") == wanted and job.get("status") in ("finished", "skipped"):
            results = Path(job["results"])
            if results.is_file():
                return results
    return None


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError):  # a job that was cut off while writing an older format
        return {}


class SweepReport(Callback):
    """Hydra callback: write sweep.csv and sweep.png after every job; name what failed at the end of a sweep.

    Args:
        x: key of results.json on the horizontal axis of the plot.
        panels: keys of results.json on the vertical axis, a list for each panel beside the others, where
            results name no objective.
    """

    def __init__(self, x: str, panels: list[list[str]]) -> None:
        self.x, self.panels = x, panels

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        """Add the job to table and plot: what has finished is there, however the sweep ends."""
        if config.hydra.mode == RunMode.MULTIRUN:
            self._write(Path(config.hydra.sweep.dir))

    def _write(self, folder: Path) -> tuple[list[dict[str, Any]], bool]:
        """Read every job.json of the sweep, write its files; return the jobs, and whether there is a plot."""
        jobs = sorted((_read(f) for f in folder.glob("*/job.json")), key=lambda j: j.get("job", 0))
        columns = ["error"] if any("error" in job for job in jobs) else []
        rows = [_row(job, ["job", "status", *columns]) for job in jobs]
        if rows:
            _write_csv(folder / "sweep.csv", rows)
        objectives = {str(row["objective"]) for row in rows if row.get("objective")}
        figures = sorted(name.replace("val_", "test_") for name in objectives)
        return jobs, draw(folder / "sweep.png", rows, self.x, [[name] for name in figures] or self.panels)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Say what became of the jobs."""
        folder = Path(config.hydra.sweep.dir)
        jobs, drawn = self._write(folder)
        if not jobs:
            return
        failed = [job for job in jobs if job.get("status") == "failed"]
        short = [job for job in jobs if job.get("status") == "short"]
        below = f", {len(short)} of them short of what was required" if short else ""
        print(f"{len(jobs) - len(failed)} of {len(jobs)} jobs finished{below}")
        if drawn:
            print(f"plot: {folder / 'sweep.png'}")
        print(f"results: {folder / 'sweep.csv'}", flush=True)
        if failed or short:
            code, line = _summed_up(failed or short, len(jobs))
            print(f"{SAID[code]}: {line}", file=sys.stderr, flush=True)
            sys.exit(code)


def _summed_up(bad: list[dict[str, Any]], jobs: int) -> tuple[int, str]:
    """Return the exit code of a sweep, the gravest of its jobs', and one line: how many, and the first one.

    Args:
        bad: what is in the job.json of those that did not end well.
        jobs: how many there are.
    """
    code = min(job["code"] for job in bad)
    first = next(job for job in bad if job["code"] == code)
    verb = "fell short of what was required" if code == 3 else "failed"
    more = "; each one's reason is in the column error of sweep.csv" if len(bad) > 1 else ""
    return code, f"{len(bad)} of {jobs} jobs {verb}: {_named(first)}: {first['error']}{more}"


def _row(job: dict[str, Any], columns: list[str]) -> dict[str, Any]:
    row = {key: job.get(key) for key in columns}
    row["overrides"] = " ".join(job.get("overrides", []))
    if job.get("results"):
        results = _read(Path(job["results"]))
        row.update({k: v for k, v in results.items() if not isinstance(v, dict | list)})
        row["results"] = job["results"]
    return row


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    import pandas as pd

    write_table(path, pd.DataFrame(rows))
