"""The same calibration problems through sparsereg and its peers: errors, distance, bounds, time.

    python -m benchmarks.publishable --data FOLDER
    python -m benchmarks.publishable --data FOLDER --python balance=ENV/bin/python --blas libblas.so.3
    python -m benchmarks.publishable --only apiclus1 --only eusilc --peers sparsereg,survey
    python -m benchmarks.publishable --data FOLDER --only Oregon    a row that cannot be met, and what it does

FOLDER holds cps_households.csv.gz (w, fips, agi, XTOT) and cps_targets.csv.gz: 280,005 US tax units and
published totals by state. What is not installed is left out and named: R with survey (``apt-get install
r-base-core r-cran-survey``), and the packages svy, balance, microcalibrate, l0-python. ``--python NAME=PATH``
runs a peer in an environment of its own; ``--blas`` is another libblas.so.3 for R, such as OpenBLAS's.

Every peer runs in a process of its own. Time is processor time of the call that finds the weights, problem in
memory, libraries imported (ours, and svy's on small samples: the median of five after a first one). Errors
are measured here, in float64, with one scale for all.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

HERE = Path(__file__).parent
REFERENCE = HERE.parent / "tests" / "calibration" / "reference"
PEERS = ("sparsereg", "survey", "svy", "balance", "microcalibrate", "l0-python")
MODULES = {
    "survey": None,
    "svy": "svy",
    "balance": "balance",
    "microcalibrate": "microcalibrate",
    "l0-python": "l0",
}
UNBOUNDED = (-np.inf, np.inf)
SECONDS = 3600


@dataclass(frozen=True)
class Case:
    """A problem with a distance.

    Args:
        name: Of the case.
        matrix: Targets x households.
        targets: Shape (targets,).
        weights: Initial ones, shape (households,).
        distance: "linear" or "raking" or "logit".
        bounds: Of weight over initial weight.
        factor: q of each household; None: 1.
        margins: Codes of each household in each margin, if the targets are counts of them, else None.
    """

    name: str
    matrix: sp.csr_array
    targets: np.ndarray
    weights: np.ndarray
    distance: str
    bounds: tuple[float, float] = UNBOUNDED
    factor: np.ndarray | None = None
    margins: np.ndarray | None = None

    def write(self, folder: Path) -> None:
        """Write it for the peers."""
        factor = np.ones(len(self.weights)) if self.factor is None else self.factor
        margins = np.empty((0, 0), dtype=int) if self.margins is None else self.margins
        sp.save_npz(folder / "matrix.npz", sp.csr_matrix(self.matrix))
        np.savez(
            folder / "case.npz", targets=self.targets, weights=self.weights, bounds=self.bounds,
            factor=factor, margins=margins, distance=self.distance,
        )  # fmt: skip
        entries = self.matrix.tocoo()
        (folder / "distance.txt").write_text(self.distance + "\n")
        for name, values, kind in (
            ("shape", entries.shape, "i4"), ("target", entries.row, "i4"), ("household", entries.col, "i4"),
            ("entry", entries.data, "f8"), ("weight", self.weights, "f8"), ("factor", factor, "f8"),
            ("bounds", self.bounds, "f8"), ("totals", self.targets, "f8"),
        ):  # fmt: skip
            np.asarray(values, dtype=kind).tofile(folder / f"{name}.bin")

    @classmethod
    def read(cls, folder: Path) -> Case:
        """Read it again."""
        given = np.load(folder / "case.npz")
        margins = given["margins"]
        return cls(
            "", sp.csr_array(sp.load_npz(folder / "matrix.npz")), given["targets"], given["weights"],
            str(given["distance"]), tuple(given["bounds"]), given["factor"],
            margins if margins.size else None,
        )  # fmt: skip


def _of_reference(name: str, distance: str, bounds: tuple[float, float]) -> Case:
    import pandas as pd

    table = pd.read_csv(REFERENCE / f"{name}.csv.gz")
    rows = [c for c in table.columns if c.startswith("x")]
    t = table.iloc[1:]
    matrix = sp.csr_array(t[rows].to_numpy(float).T)
    label = f"{name}, {distance}" + ("" if bounds == UNBOUNDED else f" in [{bounds[0]:g}, {bounds[1]:g}]")
    totals = table.loc[0, rows].to_numpy(float)
    return Case(label, matrix, totals, t.weight.to_numpy(), distance, bounds, t.factor.to_numpy())


def small_cases() -> list[Case]:
    """R's apiclus1 (183 schools) and eusilc (2,000 households of persons)."""
    return [
        _of_reference("apiclus1", "linear", UNBOUNDED),
        _of_reference("apiclus1", "raking", (0.0, np.inf)),
        _of_reference("apiclus1", "logit", (0.7, 1.7)),
        _of_reference("eusilc", "linear", UNBOUNDED),
        _of_reference("eusilc", "raking", (0.5, 2.0)),
    ]


def large_cases(folder: Path) -> list[Case]:
    """The tax units: 521 totals (population and 470 counts of income classes by state), and two margins."""
    import pandas as pd

    h, t = pd.read_csv(folder / "cps_households.csv.gz"), pd.read_csv(folder / "cps_targets.csv.gz")
    w, states = h.w.to_numpy(), np.unique(h.fips)
    state = np.searchsorted(states, h.fips)
    edges = [-np.inf, 1, 10_000, 25_000, 50_000, 75_000, 100_000, 200_000, 500_000, 1_000_000, np.inf]
    income = np.digitize(h.agi, edges[1:-1])
    cell = state * 10 + income
    counts = t[t.group == "agi count"].value.to_numpy()  # by state, ten classes each
    people = t[t.group == "population"]
    place = np.searchsorted(states, people["where"].str.extract(r"== (\d+)$")[0].astype(int))
    sizes = np.bincount(cell, minlength=510)
    kept = np.sort(np.argsort(-sizes, kind="stable")[:470])
    j, n = np.arange(len(w)), len(w)
    cells = sp.csr_array((np.ones(n), (cell, j)), shape=(510, n))
    persons = sp.csr_array((h.XTOT.to_numpy(float), (state, j)), shape=(51, n))
    rows = sp.csr_array(sp.vstack([cells[kept], persons[place]]))
    rows.eliminate_zeros()
    totals = np.concatenate([counts[kept], people.value.to_numpy()])
    margin_rows = sp.csr_array(sp.vstack([sp.csr_array((np.ones(n), (code, j))) for code in (state, income)]))
    table = counts.reshape(51, 10)
    margins = np.concatenate([table.sum(axis=1), table.sum(axis=0)])
    codes = np.stack([state, income])
    return [
        Case("521 totals, linear", rows, totals, w, "linear"),
        Case("521 totals, linear >= 0", rows, totals, w, "linear", (0.0, np.inf)),
        Case("521 totals, raking", rows, totals, w, "raking", (0.0, np.inf)),
        Case("521 totals, logit in [0.01, 30]", rows, totals, w, "logit", (0.01, 30.0)),
        Case("521 totals, linear in [0.01, 5]", rows, totals, w, "linear", (0.01, 5.0)),
        Case("521 totals, linear in [0.1, 8]", rows, totals, w, "linear", (0.1, 8.0)),
        Case("two margins, raking", margin_rows, margins, w, "raking", (0.0, np.inf), margins=codes),
    ]


def by_sparsereg(case: Case) -> tuple[np.ndarray, float]:
    """``method="calibrate"``; the median of five."""
    from sparsereg.calibration import CalibrationProblem, calibrate

    settings = {"method": "calibrate", "distance": case.distance, "bounds": case.bounds}
    one = np.eye(3)[:, [0, 1, 2, 0, 1, 2]]
    near = (0.5, 2.0) if case.distance == "logit" else None
    calibrate(
        CalibrationProblem(one, [2.1, 2.0, 2.0]), method="calibrate", distance=case.distance, bounds=near
    )
    times = []
    for _ in range(5):
        problem = CalibrationProblem(case.matrix, case.targets, case.weights)  # nothing known from before
        start = time.process_time()
        result = calibrate(problem, unit_factor=case.factor, **settings)
        times.append(time.process_time() - start)
    return result.weights, float(np.median(times))


def by_svy(case: Case) -> tuple[np.ndarray, float]:
    """The generalised regression estimator in closed form; the only one that it has."""
    import polars as pl
    import svy

    if case.distance != "linear" or case.bounds != UNBOUNDED:
        raise NotImplementedError("linear without bounds only")
    dense = np.ascontiguousarray(case.matrix.toarray().T)
    sample = svy.Sample(pl.DataFrame({"w": case.weights}), svy.Design(wgt="w"))
    times = []
    for _ in range(1 if dense.size > 1e7 else 6):  # the first one loads what it needs
        start = time.process_time()
        found = sample.weighting.calibrate_matrix(
            aux_vars=dense, controls=case.targets.tolist(), scale=1.0 / case.factor, weights_only=True
        )
        times.append(time.process_time() - start)
    return np.asarray(found), float(np.median(times[-5:]))


def by_balance(case: Case) -> tuple[np.ndarray, float]:
    """Iterative proportional fitting to margins."""
    import pandas as pd
    from balance.weighting_methods.rake import rake

    if case.margins is None:
        raise NotImplementedError("counts of categories only")
    names = [f"m{i}" for i in range(len(case.margins))]
    frame = pd.DataFrame({n: np.char.mod("v%d", m) for n, m in zip(names, case.margins, strict=True)})
    starts = np.cumsum([0] + [int(m.max()) + 1 for m in case.margins])
    shares = {
        n: {f"v{k}": float(v / case.targets[a:b].sum()) for k, v in enumerate(case.targets[a:b])}
        for n, a, b in zip(names, starts[:-1], starts[1:], strict=True)
    }
    start = time.process_time()
    found = rake(
        frame,
        pd.Series(case.weights),
        None,
        None,
        target_margins=shares,
        variables=names,
        transformations=None,
    )["weight"].to_numpy()
    spent = time.process_time() - start
    return found * (case.targets[: starts[1]].sum() / found.sum()), spent


def by_microcalibrate(case: Case) -> tuple[np.ndarray, float]:
    """Gradient descent on relative errors, with its defaults but for 1,000 epochs and no noise."""
    import pandas as pd
    from microcalibrate import Calibration

    names = np.array([f"t{i}" for i in range(len(case.targets))])
    frame = pd.DataFrame(case.matrix.toarray().T.astype(np.float32), columns=names)
    large = frame.size > 1e7
    run = Calibration(
        weights=case.weights, targets=case.targets, target_names=names, estimate_matrix=frame,
        epochs=32 if large else 1000, noise_level=0.0, learning_rate=1e-2,
    )  # fmt: skip
    start = time.process_time()
    run.calibrate()
    return np.asarray(run.weights, dtype=float), time.process_time() - start


def by_l0(case: Case) -> tuple[np.ndarray, float]:
    """Gates and weights by gradient descent on relative errors, without a penalty, 1,000 epochs."""
    import torch
    from l0.calibration import SparseCalibrationWeights

    torch.manual_seed(0)
    model = SparseCalibrationWeights(
        len(case.weights), beta=0.65, init_keep_prob=0.999, init_weights=case.weights, seed=0
    )
    start = time.process_time()
    model.fit(
        sp.csr_matrix(case.matrix), case.targets, lambda_l0=0.0, lr=0.05, epochs=1000, loss_type="relative"
    )
    spent = time.process_time() - start
    with torch.no_grad():
        return model.get_weights(deterministic=True).double().numpy(), spent


SOLVERS = {
    "sparsereg": by_sparsereg,
    "svy": by_svy,
    "balance": by_balance,
    "microcalibrate": by_microcalibrate,
    "l0-python": by_l0,
}


def work(peer: str, folder: Path) -> None:
    """In the process of a peer: solve, and leave what was found."""
    try:
        weights, spent = SOLVERS[peer](Case.read(folder))
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        sys.exit(f"refused: {lines[0] if lines else type(error).__name__}")
    np.asarray(weights, dtype=float).tofile(folder / "found.bin")
    print(spent)


def ask(peer: str, folder: Path, args: argparse.Namespace) -> tuple[np.ndarray | None, float, str]:
    """Weights, processor seconds, and what the peer said where it has none."""
    pythons = dict(entry.split("=", 1) for entry in args.python)
    environment = dict(os.environ)
    if peer == "survey":
        command = ["Rscript", str(HERE / "publishable.R"), str(folder)]
        if args.blas:
            environment["LD_PRELOAD"] = args.blas
    else:
        command = [
            pythons.get(peer, sys.executable),
            "-m",
            "benchmarks.publishable",
            "--work",
            peer,
            str(folder),
        ]
        if peer in pythons:
            environment.pop("PYTHONPATH", None)
    (folder / "found.bin").unlink(missing_ok=True)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=args.seconds, cwd=HERE.parent
        )
    except subprocess.TimeoutExpired:
        return None, float("nan"), f"not done in {args.seconds} s"
    if not (folder / "found.bin").is_file():
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing said"]
        errors = [line for line in said if "rror" in line or "refused" in line] or said
        return None, float("nan"), errors[-1][:90]
    return np.fromfile(folder / "found.bin"), float(done.stdout.split()[-1]), ""


def judge(case: Case, w: np.ndarray) -> dict[str, Any]:
    """Worst error over the scale, distance per unit of weight, whether bounds hold."""
    scale = np.maximum(np.abs(case.targets), 1e-3 * (abs(case.matrix) @ case.weights))
    ratio = w / case.weights
    low, high = case.bounds
    kept = bool((ratio >= low * (1 - 1e-9) - 1e-12).all() and (ratio <= high * (1 + 1e-9)).all())
    factor = np.ones(len(w)) if case.factor is None else case.factor
    if case.distance == "linear":
        far = 0.5 * (ratio - 1) ** 2
    elif case.distance == "raking":
        positive = np.maximum(ratio, 1e-300)
        far = positive * np.log(positive) - positive + 1
    else:
        far = None
    share = case.weights / factor
    return {
        "worst error": float(np.abs((case.matrix @ w - case.targets) / scale).max()),
        "distance": None if far is None else float(share @ far / share.sum()),
        "bounds kept": kept,
    }


def there(peer: str, args: argparse.Namespace) -> bool:
    """Whether a peer can be asked."""
    if peer == "sparsereg" or any(entry.startswith(f"{peer}=") for entry in args.python):
        return True
    if peer == "survey":
        return shutil.which("Rscript") is not None
    return importlib.util.find_spec(str(MODULES[peer])) is not None


def standard_errors(args: argparse.Namespace) -> None:
    """The mean of api00 in apiclus1, calibrated, linearised and by the jackknife."""
    import pandas as pd

    from sparsereg.calibration import CalibrationProblem, Design, calibrate

    t = pd.read_csv(REFERENCE / "variance_apiclus1.csv.gz")
    rows = np.stack([np.ones(len(t)), t.stype == "H", t.stype == "M", t.api99]).astype(float)
    problem = CalibrationProblem(rows, [6194, 755, 1018, 3914069], t.pw.to_numpy())
    calibrate(problem, method="calibrate")
    start = time.process_time()
    result = calibrate(problem, method="calibrate")
    found = []
    for method in ("linearized", "jackknife"):
        design = Design(method, psu=t.dnum.to_numpy(), fpc=t.fpc.to_numpy())
        found.append(float(result.standard_errors(t[["api00"]], design, "mean").se[0]))
    spent = time.process_time() - start
    print("\nstandard error of the mean of api00, apiclus1: linearised, jackknife, seconds")
    print(f"sparsereg      {found[0]:.6f} {found[1]:.6f} {spent:.3f}")
    if there("survey", args):
        done = subprocess.run(
            ["Rscript", str(HERE / "publishable.R"), "errors"], capture_output=True, text=True, check=True
        )
        one, two, spent = map(float, done.stdout.split()[-3:])
        print(f"survey         {one:.6f} {two:.6f} {spent:.3f}")


def a_row_that_cannot_be_met(folder: Path) -> None:
    """What a target of zero for Oregon's income does to its other totals, and how good they can be at all."""
    import pandas as pd

    from sparsereg.calibration import calibrate, problem_from_frames

    h, t = pd.read_csv(folder / "cps_households.csv.gz"), pd.read_csv(folder / "cps_targets.csv.gz")
    zero = pd.DataFrame([{"name": "zero OR", "value": 0.0, "measure": "agi", "where": "fips == 41"}])
    own = t["where"].str.contains("fips == 41").to_numpy()
    print("\nmean error of Oregon's totals: all 23, the 22 above zero")
    for label, table in (("without", t), ("with", pd.concat([t, zero.assign(group="agi amount")]))):
        problem = problem_from_frames(h, table.reset_index(drop=True), weight="w", id="RECID")
        problem = problem.subset(np.diff(problem.matrix.indptr) > 0)
        place = {name: i for i, name in enumerate(problem.names)}
        rows = np.array([place[name] for name in t.name[own]])
        for method in ("all", "calibrate"):
            found = calibrate(problem, method=method).estimates[rows]
            told = _mean_errors(found / problem.targets[rows] - 1, problem.targets[rows] > 0)
            print(f"{method:10} {label:8} the row of zero: {told}")
    oregon = problem.matrix[rows].astype(float)
    print(f"least of any weights >= 0:            {_least_errors(oregon, problem.targets[rows])}")


def _mean_errors(errors: np.ndarray, counts: np.ndarray) -> str:
    return f"{100 * np.abs(errors).mean():.2f} %, {100 * np.abs(errors[counts]).mean():.2f} %"


def _least_errors(rows: sp.csr_array, targets: np.ndarray) -> str:
    """The least mean error by a linear programme, of all of them and of those above zero."""
    from scipy.optimize import linprog

    told = []
    for some in (np.ones(len(targets), dtype=bool), targets > 0):
        part = sp.diags_array(1 / np.abs(targets[some])) @ rows[np.flatnonzero(some)]
        part = part[:, np.flatnonzero(np.diff(sp.csc_array(part).indptr))]
        eye = sp.eye_array(int(some.sum()))
        cost = np.concatenate([np.zeros(part.shape[1]), np.full(2 * eye.shape[0], 1 / eye.shape[0])])
        best = linprog(cost, A_eq=sp.hstack([part, eye, -eye]), b_eq=np.sign(targets[some]), method="highs")
        told.append(f"{100 * best.fun:.2f} %")
    return ", ".join(told)


def versions(args: argparse.Namespace) -> str:
    """Of everything that takes part."""
    told = [f"Python {sys.version.split()[0]}", f"numpy {np.__version__}"]
    for peer in PEERS:
        if peer in ("sparsereg", "survey"):
            continue
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            told.append(f"{peer} {importlib.metadata.version(peer)}")
    if there("survey", args):
        code = 'cat(as.character(getRversion()), ", survey ", format(packageVersion("survey")), sep = "")'
        done = subprocess.run(["Rscript", "-e", code], capture_output=True, text=True, check=False)
        told.append(f"R {done.stdout.strip()}")
    return ", ".join(told)


def main() -> None:
    """Ask every peer for every case and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="the folder of the tax units")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--blas", help="another libblas.so.3 for R")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--only", action="append", help="cases whose names begin so")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="longest time of one peer on one case")
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work[0], Path(args.work[1]))
        return
    cases = small_cases() + (large_cases(args.data) if args.data else [])
    cases = [c for c in cases if any(c.name.startswith(o) for o in args.only or [""])]
    peers = [p for p in args.peers.split(",") if there(p, args)]
    left_out = [p for p in args.peers.split(",") if p not in peers]
    print(versions(args) + (f"; not installed: {', '.join(left_out)}" if left_out else ""), flush=True)
    rows = []
    for case in cases:
        print(f"\n{case.name} ({len(case.weights):,} x {len(case.targets)})", flush=True)
        with tempfile.TemporaryDirectory() as name:
            case.write(Path(name))
            for peer in peers:
                weights, spent, said = ask(peer, Path(name), args)
                row = {"case": case.name, "peer": peer, "seconds": spent, "said": said}
                row |= {} if weights is None else judge(case, weights)
                rows.append(row)
                print(line(row), flush=True)
    if any("apiclus1".startswith(o) for o in args.only or [""]):
        standard_errors(args)
    if args.data and any("Oregon".startswith(o) for o in args.only or [""]):
        a_row_that_cannot_be_met(args.data)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    if row["said"]:
        return f"{row['peer']:15} {row['said']}"
    far = "-" if row["distance"] is None else f"{row['distance']:.8g}"
    held = "bounds kept" if row["bounds kept"] else "bounds broken"
    error, spent = row["worst error"], row["seconds"]
    return f"{row['peer']:15} error {error:.1e}  distance {far:14}  {held:13}  {spent:.4f} s"


if __name__ == "__main__":
    main()
