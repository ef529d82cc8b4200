"""A seeded sample of the attacks, within a minute; ``python -m tests.fuzz`` runs them at length."""

import csv
import os
import subprocess
import sys

import pytest

from .process import ROOT

CASES = 40
SECONDS = 50
"""For all kinds together; the imports and the base come on top."""


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """One process attacks: pytest's own has threads, and is not to be forked."""
    out = tmp_path_factory.mktemp("fuzz")
    call = [
        sys.executable,
        "-m",
        "tests.fuzz",
        "--cases",
        str(CASES),
        "--seed",
        "11",
        "--seconds",
        str(SECONDS),
        "--out",
        str(out),
    ]
    ended = subprocess.run(
        call, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    return ended, out / "violations.csv"


def test_no_attack_succeeds(campaign):
    ended, summary = campaign
    with summary.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert not [(row["case"], row["violation"], row["error"]) for row in found], ended.stdout
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_every_kind_had_its_turn(campaign):
    ended, _ = campaign
    counts = [
        int(line.split()[1])
        for line in ended.stdout.splitlines()
        if line.split(":")[0] in ("commands", "files", "flips")
    ]
    assert len(counts) == 3
    assert min(counts) >= 1
    assert ended.stdout.count("kills or full disks") == 2
