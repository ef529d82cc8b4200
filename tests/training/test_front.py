"""The front from one run: every size is met, the run is the one that it would have been, and it goes on."""

import csv

import pytest

from sparsereg.compression import load_compacted
from sparsereg.errors import InputError
from sparsereg.settings import read
from sparsereg.training.config import Training
from sparsereg.training.pick import Pick

from .test_resume import assert_same_weights

FRONT = [
    "model=lenet300",
    "front=[0.3,0.6,0.8]",
    "trainer.max_epochs=4",
    "front_epochs=1",
    "optimizer.lr=0.01",
    "optimizer.warmup_epochs=0",
]


def rows(outcome):
    with (outcome.folder / "front.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_every_size_is_met_and_the_run_is_the_same(run, tiny):
    made = run("train", *tiny, *FRONT, "pick=parameters<=60000")
    assert made.code == 0, made.err
    found = rows(made)
    assert [row["size"] for row in found] == [0.3, 0.6, 0.8]
    for row in found:
        assert row["size"] <= row["sparsity"] <= row["size"] + 0.02
    picked = made.results["picked"]
    assert picked["parameters"] <= 60000
    assert picked["val_acc"] == max(row["val_acc"] for row in found if row["parameters"] <= 60000)
    small = load_compacted(picked["file"])
    assert sum(p.numel() for p in small.parameters()) == picked["parameters"]
    assert (made.folder / "front.png").stat().st_size > 1000
    plain = [a for a in FRONT if not a.startswith("front")]
    bare = run("train", *tiny, *plain, "target_sparsity=0.8")
    assert_same_weights(made.weights(), bare.weights())
    again = run("test", f"ckpt_path={picked['file']}", "trainer.enable_progress_bar=false")
    assert again.results["test_acc"] == picked["test_acc"]


def test_a_run_that_was_cut_off_makes_what_is_missing(run, tiny):
    part = run("train", *tiny, *FRONT)
    (part.folder / "front" / "0.8" / "figures.json").unlink()  # as if it was cut off just before
    more = run("train", f"ckpt_path={part.last}", "resume_training=true", "trainer.max_epochs=5")
    assert more.code == 0, more.err
    assert [row["size"] for row in rows(more)] == [0.3, 0.6, 0.8]
    assert rows(more)[:2] == rows(part)[:2]


def test_nothing_that_fits_is_said_and_all_is_written(run, tiny):
    made = run("train", *tiny, *FRONT, "pick=parameters<=10")
    assert made.code == 3
    assert "no network of the front fits, the nearest has" in made.err


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["front=[0.5,1.5]"], "front="),
        (["front=[0.7,0.5]"], "expected shares to remove that rise"),
        (["front=[0.5,0.7]", "target_sparsity=0.9"], "is the way to target_sparsity=0.7"),
        (["front=[0.5]", "pick=milliseconds<=3"], "front.csv has no column 'milliseconds'"),
        (["front=[0.5]", "pick=macs=3"], "such as pick='macs<=1e6'"),
        (["pick=macs<=3"], "needs a front"),
    ],
)
def test_wrong_fronts_are_refused_in_one_line(run, tiny, wrong, said):
    outcome = run("train", *tiny, "model=lenet300", *wrong)
    assert outcome.code == 2
    assert said in outcome.err.strip().splitlines()[-1]


def test_picks_are_read():
    assert Pick.read(" latency_ms <= 3e0", ["acc"]) == Pick("latency_ms", "<=", 3.0)
    assert Pick.read("test_acc>=0.9", ["acc"]).fits({"test_acc": 0.95})
    with pytest.raises(InputError, match="did you mean 'latency_ms'"):
        Pick.read("latency<=3", ["acc"])


def test_a_front_takes_the_place_of_the_lambda_of_an_experiment():
    settings = read(Training, {"front": [0.5, 0.7], "lambda_l0": None})
    assert settings.front == (0.5, 0.7)
