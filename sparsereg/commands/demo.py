"""The whole story in a few minutes, on data that need no download: `make demo`, `sparsereg demo`.

Trains a gated GoogleNet on scikit-learn's digits and a byte-level GPT on the sources of Python's standard
library, tests them, compacts them, and calibrates a synthetic survey, by the commands that a user would type.
Ends with a table of what was reached.
"""

import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def call(*arguments: str) -> dict[str, Any]:
    """Run a command, show what it prints, and return its results.

    Raises:
        SystemExit: the command failed.
    """
    print(f"\n$ sparsereg {' '.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "sparsereg", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line if line.strip() else last
    if process.wait():
        sys.exit(f"the demo stopped: {arguments[0]} ended with exit code {process.returncode}")
    path = Path(last.strip().removeprefix("results: "))
    return {**json.loads(path.read_text()), "path": path}


def missing(*modules: str) -> bool:
    """Whether one of some modules is not installed."""
    return any(find_spec(module) is None for module in modules)


def main(arguments: list[str] | None = None) -> None:
    """Run everything and print the table; there are no arguments to give."""
    given = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(given):
        sys.exit(print(__doc__))
    if given:
        print(f"error: sparsereg demo takes no arguments, got {given[0]!r}", file=sys.stderr)
        sys.exit(2)
    start = time.perf_counter()
    trained = call("train", "experiment=digits_demo")
    tested = call("test", f"ckpt_path={trained['checkpoint']}", "compact=true")
    text = call("train", "experiment=gpt_demo")
    export = [] if missing("onnx", "onnxscript", "onnxruntime") else ["export=onnx"]
    small = call("test", f"ckpt_path={text['checkpoint']}", "compact=true", *export)
    calibrated = call("calibrate")
    minutes = (time.perf_counter() - start) / 60
    rows = [
        ("gated GoogleNet on digits: test accuracy", f"{tested['test_acc']:.2%}"),
        ("  parameters that can go (exact sparsity)", f"{tested['exact_sparsity']:.2%}"),
        ("  parameters", f"{tested['parameters']:,} -> {tested['compacted_parameters']:,}"),
        ("  multiply-accumulates per image", f"{tested['macs']:,} -> {tested['compacted_macs']:,}"),
        ("  compacted network: test accuracy", f"{tested['compacted_test_acc']:.2%}"),
        ("byte-level GPT on Python's sources: bits per byte", f"{small['test_bits_per_byte']:.3f}"),
        ("  open gates of heads, units, width, blocks", f"{small['open_gates']:,} of {small['gates']:,}"),
        ("  parameters", f"{small['parameters']:,} -> {small['compacted_parameters']:,}"),
        ("  multiply-accumulates per window", f"{small['macs']:,} -> {small['compacted_macs']:,}"),
        ("  compacted network: bits per byte", f"{small['compacted_test_bits_per_byte']:.3f}"),
        *([("  for other runtimes", Path(small["exported"]).name)] if export else []),
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
  docs/any-network.md: the same for any network, in your own training
  {calibrated["path"].parent}/: weights, targets and plots of the survey
  README.md: CIFAR-10, sweeps over lambda, your own data""")


if __name__ == "__main__":
    main()
