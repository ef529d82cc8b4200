"""Attacks at length: ``python -m tests.fuzz --kind commands --cases 2000``; see docs/robustness.md."""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from . import process

SHARES = {"commands": 1.0, "files": 1.0, "flips": 0.3, "kills": 0.1, "disk": 0.1}
"""How many cases of each kind ``--kind all`` tries, over ``--cases``: some take longer than others."""


def main(argv: list[str] | None = None) -> int:
    """Run attacks; return 1 if any of them found something."""
    options = _options(argv)
    out = Path(options.out or tempfile.mkdtemp(prefix="sparsereg-fuzz-")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    process.preload()
    from . import campaign, files, flips, kills

    def numbers(start: int) -> range:
        share = SHARES[kind] if options.kind == "all" else 1.0
        return range(start, start + max(1, round(options.cases * share)))

    kinds = tuple(SHARES) if options.kind == "all" else (options.kind,)
    if options.replay:
        kind, seed, number = options.replay.split("-")
        kinds, options.seed, options.start, options.cases = (kind,), int(seed), int(number), 1
    made = campaign.Campaign(
        out, options.jobs, options.limit, options.real, options.keep or bool(options.replay)
    )
    bad = 0
    for kind in kinds:
        seconds = options.seconds / len(kinds) if options.seconds else None
        if kind in ("kills", "disk"):
            harness = kills.Kills(out, made.base, options.seed, options.limit, options.real)
            bad += harness.run(kind, numbers(options.start), seconds)
            print(harness.told(), flush=True)
            continue
        attacks: Iterator[campaign.Attack]
        if kind == "commands":
            attacks = campaign.command_attacks(options.seed, numbers(options.start))
        elif kind == "files":
            attacks = files.attacks(options.seed, numbers(options.start), made.base)
        else:
            attacks = flips.attacks(options.seed, numbers(options.start), made.base)
        if options.compare:
            bad += made.compare(attacks)
            continue
        made.counts.clear(), made.codes.clear()
        made.done = made.bad = 0
        made.slowest = []
        bad += made.run(attacks, seconds)
        print(f"{kind}: {made.told()}", flush=True)
        if options.replay:
            _show(out / "cases" / options.replay)
    print(f"summary: {out / 'violations.csv'}")
    return int(bool(bad))


def _show(folder: Path) -> None:
    print(f"in {folder}")
    for name in (".stdout", ".stderr"):
        print(f"--- {name}\n{(folder / name).read_text(errors='replace')[-6000:]}")
    for log in (folder / "outputs" / "failures").glob("*.log"):
        print(f"--- {log}\n{log.read_text()[-6000:]}")


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument(
        "--kind", default="all", choices=["all", "commands", "files", "flips", "kills", "disk"]
    )
    parser.add_argument("--cases", type=int, default=200, help="of each kind; of all kinds, so many commands")
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--seconds", type=float, help="stop after so many seconds, shared out to the kinds")
    parser.add_argument("--limit", type=float, default=90, help="seconds for one case")
    parser.add_argument("--out", help="folder for the summary and for the folders of violations")
    parser.add_argument("--replay", help="a case of the summary, e.g. commands-1-17")
    parser.add_argument("--real", action="store_true", help="a new interpreter for each case, not a fork")
    parser.add_argument("--compare", action="store_true", help="run each case both ways and compare")
    parser.add_argument("--keep", action="store_true", help="keep the folders of all cases")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
