"""The whole story in a few minutes, on data that need no download: `make demo`.

Trains a gated GoogleNet on scikit-learn's digits, tests it, compacts it, and calibrates a synthetic survey,
by the commands that a user would type. Ends with a table of what was reached.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def call(*arguments: str) -> dict[str, Any]:
    """Run a script, show what it prints, and return its results.

    Raises:
        SystemExit: the script failed.
    """
    print(f"\n$ python {' '.join(arguments)}", flush=True)
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line if line.strip() else last
    if process.wait():
        sys.exit(f"the demo stopped: {arguments[0]} ended with exit code {process.returncode}")
    path = ROOT / last.strip().removeprefix("results: ")
    return {**json.loads(path.read_text()), "path": path}


def main() -> None:
    """Run everything and print the table."""
    start = time.perf_counter()
    trained = call("train.py", "experiment=digits_demo")
    tested = call("test.py", f"ckpt_path={trained['checkpoint']}", "compact=true")
    calibrated = call("calibrate.py")
    minutes = (time.perf_counter() - start) / 60
    rows = [
        ("gated GoogleNet on digits: test accuracy", f"{tested['test_acc']:.2%}"),
        ("  parameters that can go (exact sparsity)", f"{tested['exact_sparsity']:.2%}"),
        ("  parameters", f"{tested['parameters']:,} -> {tested['compacted_parameters']:,}"),
        ("  multiply-accumulates per image", f"{tested['macs']:,} -> {tested['compacted_macs']:,}"),
        ("  compacted network: test accuracy", f"{tested['compacted_test_acc']:.2%}"),
        ("survey: households kept", f"{calibrated['kept']:,} of {calibrated['households']:,}"),
        ("  targets", f"{calibrated['targets']:,}"),
        ("  mean absolute relative error", f"{calibrated['mean_are']:.3%}"),
        ("minutes for all of it", f"{minutes:.1f}"),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n" + "\n".join(f"{name:{width}s}  {value}" for name, value in rows))
    print(f"""
Look next:
  tensorboard --logdir ./outputs/train/tblog/lightning_logs/
  {Path(tested["compacted"]).name} beside {trained["checkpoint"]}: the smaller network
  {calibrated["path"].parent.relative_to(ROOT)}/: weights, targets and plots of the survey
  README.md: CIFAR-10, sweeps over lambda, your own data""")


if __name__ == "__main__":
    main()
