"""The front from one run: every size is met, from the network that a plain run trains, and it goes on."""

import copy
import csv
import shutil
from types import SimpleNamespace

import pytest
import torch

from sparsereg.compression import load_compacted
from sparsereg.compression.oneshot import ranked
from sparsereg.compression.timing import runtimes
from sparsereg.compression.units import tracing
from sparsereg.errors import InputError
from sparsereg.settings import read
from sparsereg.training import stages
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
    bare = run("train", *tiny, *plain, "without_using_gate=true")
    assert_same_weights(made.weights(), bare.weights())
    assert made.results["dense"]["test_acc"] == bare.results["test_acc"]
    again = run("test", f"ckpt_path={made.folder}", "trainer.enable_progress_bar=false")
    assert again.results["test_acc"] == picked["test_acc"] == made.results["test_acc"]
    assert [a["name"] for a in made.results["artefacts"]][0] == "dense"
    assert made.results["ship"] == picked["file"].replace("front/0.8", "checkpoints")


def test_sizes_are_timed_where_the_run_says(run, tiny, monkeypatch):
    measured = []

    def benchmark(*args, **kwargs):
        measured.append(front.benchmark(*args, **kwargs))
        return measured[-1]

    front = SimpleNamespace(benchmark=stages.front.benchmark)
    monkeypatch.setattr(stages.front, "benchmark", benchmark)
    short = ["front=[0.3,0.6]", "trainer.max_epochs=1"]
    made = run("train", *tiny, *FRONT[:1], *short, "runtime=eager", "batch=3", "pick=latency_ms<=1000")
    assert made.code == 0, made.err
    (taken,) = measured
    assert "front: timing 2 networks in eager" in made.out + made.err
    assert {(row.runtime, row.batch) for row in taken.rows} == {("eager", 3)}
    assert {row["latency_ms"] for row in rows(made)} == {1e3 * row.seconds for row in taken.rows}


def test_the_largest_size_comes_first_in_whatever_order_folders_are_read(tmp_path):
    for number, sizes in enumerate([(0.5, 0.8, 0.95), (0.95, 0.8, 0.5), (0.8, 0.95, 0.5)]):
        for size in sizes:
            place = stages.front.place_of(tmp_path / str(number), size)
            place.mkdir(parents=True)
            (place / "figures.json").write_text(f'{{"size": {size}}}')
        rows = stages.front._rows(tmp_path / str(number))
        assert [row["size"] for row in rows.values()] == [0.5, 0.8, 0.95]


@pytest.mark.skipif(runtimes.installed("openvino"), reason="OpenVINO is installed")
def test_a_runtime_that_is_missing_is_said_before_training(run, tiny):
    refused = run("train", *tiny, *FRONT, "runtime=openvino")
    assert refused.code == 2
    assert "runtime=openvino needs the package openvino" in refused.err


@pytest.mark.costly
def test_a_run_that_was_cut_off_makes_what_is_missing(run, tiny):
    part = run("train", *tiny, *FRONT)
    assert part.results["ship"] is None  # nobody has picked
    for said in (part.out, (part.folder / "report.html").read_text()):
        assert "no size was picked, and ckpt_path of this run is the whole network" in said
    (part.folder / "front" / "0.8" / "figures.json").unlink()  # as if it was cut off just before
    (part.folder / "results.json").unlink()
    more = run("train", f"ckpt_path={part.last}", "resume_training=true")
    assert more.code == 0, more.err
    assert [row["size"] for row in rows(more)] == [0.3, 0.6, 0.8]
    assert rows(more)[:2] == rows(part)[:2]
    same = [{k: v for k, v in rows(r)[2].items() if k != "latency_ms"} for r in (more, part)]
    assert same[0] == same[1]


@pytest.mark.slow
def test_a_run_that_trains_on_makes_all_sizes_anew(run, tiny):
    part = run("train", *tiny, *FRONT)
    more = run("train", f"ckpt_path={part.last}", "resume_training=true", "trainer.max_epochs=5")
    assert more.code == 0, more.err
    assert all(a["latency_ms"] != b["latency_ms"] for a, b in zip(rows(more), rows(part), strict=True))


@pytest.mark.costly
def test_a_trained_network_gets_a_front_without_training(run, tiny):
    trained = run("train", *tiny, *(a for a in FRONT if "front" not in a), "without_using_gate=true")
    made = run("train", f"ckpt_path={trained.folder}", *tiny, "front=[0.5,0.7]", "trainer.max_epochs=0",
               "front_epochs=1", "pick=size<=0.5")  # fmt: skip
    assert made.code == 0, made.err
    assert made.results["dense"]["test_acc"] == trained.results["test_acc"]
    assert rows(made)[0]["size"] <= rows(made)[0]["sparsity"] <= 0.52
    # Cut off after the first size, it goes on from there.
    assert_same_weights(made.weights(), trained.weights())
    shutil.rmtree(made.folder / "front/0.7")
    (made.folder / "results.json").unlink()
    again = run("train", f"ckpt_path={made.last}", "resume_training=true")
    assert again.code == 0, again.err
    first, second = rows(again)
    assert first == rows(made)[0]
    assert second["test_acc"] == rows(made)[1]["test_acc"]


@pytest.mark.costly
def test_nothing_that_fits_is_said_and_all_is_written(run, tiny):
    made = run("train", *tiny, *FRONT, "pick=parameters<=10")
    assert made.code == 3
    assert "no network of the front fits, the nearest has" in made.err


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["front=[0.5,1.5]"], "front="),
        (
            ["front=[0.5,0.99999]"],
            "its last size as target_sparsity=0.99999 cannot be met",
        ),
        (["front=[0.7,0.5]"], "expected shares to remove that rise"),
        (["front=[0.5,0.7]", "target_sparsity=0.9"], "ends at target_sparsity=0.7"),
        (["front=[0.5]", "target_sparsity=0.5", "target_macs=0.5"], "exclude each other"),
        (["front=[0.5]", "target.one_shot=true"], "leave target.one_shot out"),
        (["front=[0.5]", "lambda_l0=3"], "give one of them"),
        (["front=[0.5]", "pick=milliseconds<=3"], "front.csv has no column 'milliseconds'"),
        (["front=[0.5]", "pick=macs=3"], "such as pick='macs<=1e6'"),
        (["pick=macs<=3"], "needs a front"),
        (["front=[0.5]", "pick=val_bits_per_byte<=3"], "has no column 'val_bits_per_byte'"),
        (
            ["front=[0.5]", "pick=val_acc>=0.5", "data.val_size=0"],
            "nothing is measured on validation examples",
        ),
        (["front=[0.5]", "pick=test_acc>=0.5", "trainer.limit_test_batches=0"], "measured on test examples"),
        (["front=[0.5]", "pick=macs<=3", "data.val_size=0", "trainer.limit_test_batches=0"], "neither is"),
    ],
)
def test_wrong_fronts_are_refused_in_one_line(run, tiny, wrong, said):
    outcome = run("train", *tiny, "model=lenet300", *wrong)
    assert outcome.code == 2
    assert said in outcome.err.strip().splitlines()[-1]


def test_picks_are_read():
    assert Pick.read(" latency_ms <= 3e0", ["acc"]) == Pick("latency_ms", "<=", 3.0)
    assert Pick.read("test_acc>=0.9", ["acc"]).fits({"test_acc": 0.95})
    assert Pick.read("val_mse<=0.1", None).column == "val_mse"  # of a task that is not known yet
    with pytest.raises(InputError, match="did you mean 'latency_ms'"):
        Pick.read("latency<=3", ["acc"])


@pytest.mark.parametrize(
    ("run_epochs", "said", "epochs"),
    [
        (12, {}, [3, 2, 2, 3, 3]),  # about as many as of the run
        (40, {}, [10, 7, 6, 10, 10]),
        (100, {"front": [0.5, 0.875]}, [25, 50]),
        (100, {"front": [0.2, 0.5]}, [8, 17]),
        (0, {}, [1, 1, 1, 1, 1]),
        (12, {"finetune": {"epochs": 4}}, [4] * 5),
        (12, {"finetune": {"epochs": 4}, "front_epochs": 0}, [0] * 5),
    ],
)
def test_epochs_of_the_sizes_of_a_front(run_epochs, said, epochs):
    plain = {"front": [0.5, 0.7, 0.8, 0.9, 0.95], "lambda_l0": None, "trainer": {"max_epochs": run_epochs}}
    cfg = read(Training, {**plain, **said})
    assert list(cfg.epochs_of_sizes) == list(cfg.front)
    assert list(cfg.epochs_of_sizes.values()) == epochs


def test_a_front_takes_the_place_of_the_lambda_of_an_experiment():
    settings = read(Training, {"front": [0.5, 0.7], "lambda_l0": None})
    assert settings.front == (0.5, 0.7)


@pytest.mark.costly
def test_what_a_trace_and_a_file_say_is_kept_for_later_sizes(run, tiny, monkeypatch):
    traced, written = [], []
    export, write = tracing._export, runtimes.write
    monkeypatch.setattr(tracing, "_export", lambda *given: traced.append(1) or export(*given))
    monkeypatch.setattr(runtimes, "write", lambda *given: written.append(1) or write(*given))
    made = run("train", *tiny, *FRONT, "model=sparse_mlp", "front=[0.3,0.5,0.7,0.8]")
    assert made.code == 0, made.err
    assert len(traced) == 3  # the network, on larger maps, too, and the first one that is compacted
    assert len(written) == 1
    assert all(row["latency_ms"] > 0 for row in rows(made))


@pytest.mark.costly
@pytest.mark.parametrize("better", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_an_order_that_was_clearly_better_serves_later_sizes(run, tiny, monkeypatch, better):
    shares = [[0.1, 0.2], [0.2, 0.1]][better]
    monkeypatch.setattr(ranked, "unexplained", lambda _, others, __: shares[-len(others) :])
    found, orders = [], ranked.leftover
    monkeypatch.setattr(ranked, "leftover", lambda *given: found.append(list(given[-2])) or orders(*given))
    made = run("train", *tiny, *FRONT)
    assert made.code == 0, made.err
    assert found == [[0, 1], [better], [better]]
    whole = [load_compacted(made.folder / "front" / size / "compacted.pt") for size in ("0.3", "0.6", "0.8")]
    assert [net.meta["notes"]["order"] for net in whole] == [better] * 3
    shutil.rmtree(made.folder / "front" / "0.8")  # as if it was cut off before
    (made.folder / "results.json").unlink()
    again = run("train", f"ckpt_path={made.last}", "resume_training=true")
    assert again.code == 0, again.err
    assert found[3:] == [[better]]  # it is known from the file
    anew = load_compacted(again.folder / "front" / "0.8" / "compacted.pt")
    assert_same_weights(whole[2].state_dict(), anew.state_dict())


class Fading(torch.nn.Module):
    """A network whose answers follow a number that is no tensor."""

    def __init__(self):
        super().__init__()
        self.layer, self.times = torch.nn.Linear(3, 2), 1.0

    def forward(self, x):
        return self.times * self.layer(x)


def test_gates_of_the_start_serve_the_trained_network_if_it_answers_so(monkeypatch):
    net = Fading()
    known = copy.deepcopy(net)
    first = SimpleNamespace(net=net, gated=known, cfg=None, data=None)
    monkeypatch.setattr(stages, "_gated", lambda *_: "anew")
    monkeypatch.setattr(stages.build, "example_input", lambda *_: torch.ones(2, 3))
    with torch.no_grad():
        net.layer.weight.mul_(2)
    assert stages._with_gates(first, net) is known
    assert torch.equal(known.layer.weight, net.layer.weight)
    assert stages._with_gates(first, Fading()) == "anew"  # what is left of it
    net.times = 0.5
    assert stages._with_gates(first, net) == "anew"
