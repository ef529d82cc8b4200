"""test.py: measures what training measured, compacts, and the compacted network can be trained further."""

import json

import pytest
import torch

from sparsereg.commands.deployment import free_path
from sparsereg.compression import load_compacted
from sparsereg.data.form import Form
from sparsereg.layers import load_csr
from sparsereg.training.artefacts import Artefact, against_int8, table, to_ship
from sparsereg.training.tasks.classification import Classification


@pytest.fixture
def trained(trained_once, tiny):
    return trained_once(
        *tiny,
        "trainer.max_epochs=2",
        "lambda_l0=30",
        "optimizer.lr=0.05",
        "optimizer.warmup_epochs=0",
        "model.gate=all",
    )


@pytest.mark.costly
def test_it_measures_the_network_that_training_measured(run, trained):
    tested = run("test", f"ckpt_path={trained.last}", "trainer.enable_progress_bar=false")
    assert tested.code == 0, tested.err
    for key in (
        "val_acc",
        "test_acc",
        "L_C0",
        "exact_sparsity",
        "compacted_parameters",
        "open_gates",
        "macs",
    ):
        assert tested.results[key] == trained.results[key], key
    assert tested.results["exact_sparsity"] > 0
    assert tested.folder.name == "version_0"
    table = [line.split() for line in tested.out.splitlines() if line.startswith(("block", "blocks.", "all"))]
    total = dict(zip(table[0], table[-1], strict=False))
    assert int(total["parameters"].replace(",", "")) == tested.results["parameters"]
    assert int(total["open"].replace(",", "")) == tested.results["open_gates"]


@pytest.mark.costly
def test_gates_on_weights_save_storage_and_say_so(run, tiny):
    settings = ["trainer.max_epochs=2", "lambda_l0=30", "optimizer.lr=0.05", "optimizer.warmup_epochs=0"]
    size = "model.hidden_sizes=[40,20]"
    trained = run("train", *tiny, "model=sparse_mlp", size, *settings, "lambda_l2=1e-4")
    assert trained.code == 0, trained.err
    tested = run("test", f"ckpt_path={trained.last}", "compact=true")
    path = trained.folder / "checkpoints" / "compacted.csr"
    assert tested.results["csr"] == str(path)
    assert tested.results["csr_bytes"] == path.stat().st_size
    assert f"{path.stat().st_size:,} bytes of {tested.results['dense_bytes']:,} dense" in tested.out
    compacted = load_compacted(tested.results["compacted"])
    state, loaded = compacted.state_dict(), load_csr(path)
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    left = sum(int(torch.count_nonzero(value)) for value in state.values())
    assert tested.results["nonzero_parameters"] == left < sum(value.numel() for value in state.values())


@pytest.mark.slow
def test_prune_fine_tune_ship_in_three_commands(run, trained):
    tested = run("test", f"ckpt_path={trained.last}", "compact=true")
    compacted = trained.folder / "checkpoints" / "compacted.pt"
    assert tested.results["compacted"] == str(compacted)
    assert tested.results["compacted_test_acc"] == pytest.approx(tested.results["test_acc"])
    net = load_compacted(compacted)
    assert sum(p.numel() for p in net.parameters()) == tested.results["compacted_parameters"]

    again = run("test", f"ckpt_path={trained.last}", "compact=true")
    assert again.results["compacted"].endswith("compacted-1.pt")
    assert again.folder.name == "version_1"

    assert "csr" not in tested.results  # gates on channels leave no zeros behind

    quick = ["trainer=cpu", "trainer.max_epochs=1", "trainer.enable_progress_bar=false"]
    refused = run("train", f"ckpt_path={compacted}", *quick)
    assert refused.code == 2
    assert "without_using_gate=true" in refused.err
    tuned = run("train", f"ckpt_path={compacted}", "without_using_gate=true", *quick)
    assert tuned.code == 0, tuned.err
    assert tuned.results["parameters"] == tested.results["compacted_parameters"]
    before = net.state_dict()
    after = {k.removeprefix("net."): v for k, v in tuned.weights().items() if k.startswith("net.")}
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[k], after[k]) for k in before)
    shipped = run("test", f"ckpt_path={tuned.last}")
    assert shipped.results["test_acc"] == tuned.results["test_acc"]
    assert shipped.results["gates"] == 0
    for cost in ("parameters", "macs"):  # of the network that all of this began with
        assert tuned.results[f"original_{cost}"] == trained.results[cost]
        assert shipped.results[f"original_{cost}"] == trained.results[cost]
    gone = 1 - shipped.results["parameters"] / trained.results["parameters"]
    assert f"{trained.results['parameters']:,} parameters, of which {gone:.4f} are gone" in shipped.out
    assert "original_parameters" not in tested.results


@pytest.fixture
def tuned(trained_once, tiny):
    """A run of two stages, of a small network."""
    settings = ["model=lenet5", "trainer.max_epochs=2", "lambda_l0=10", "optimizer.lr=0.02"]
    return trained_once(*tiny, *settings, "finetune.epochs=1", "optimizer.warmup_epochs=0")


@pytest.mark.costly
def test_one_file_is_named_by_results_page_and_terminal(run, tuned):
    rows = {row["name"]: row for row in tuned.results["artefacts"]}
    assert list(rows) == ["dense", "gated", "tuned"]
    ship = tuned.results["ship"]
    assert ship == rows["tuned"]["file"] == tuned.results["checkpoint"] == str(tuned.last)
    assert f"ship: {ship}" in tuned.out
    page = (tuned.folder / "report.html").read_text()
    assert f"Ship this file: <code>{ship}</code>" in page
    assert page.count(f"<strong><code>{ship}</code></strong>") == 1
    assert rows["gated"]["file"] == str(tuned.last.with_name("gated.ckpt"))
    assert rows["gated"]["figures"]["test_acc"] == tuned.results["before_finetuning"]["test_acc"]
    assert rows["tuned"]["figures"]["test_acc"] == tuned.results["test_acc"]
    assert rows["tuned"]["parameters"] < rows["dense"]["parameters"] == rows["gated"]["parameters"]
    tested = run("test", f"ckpt_path={tuned.folder}")
    again = {row["name"]: row for row in tested.results["artefacts"]}
    assert tested.results["ship"] == ship  # the folder of the run means this file
    for name in rows:
        assert again[name]["figures"] == rows[name]["figures"], name
        for size in ("parameters", "macs", "megabytes"):
            assert again[name][size] == rows[name][size], (name, size)
    assert f"Ship this file: <code>{ship}</code>" in (tested.folder / "report.html").read_text()


def test_everything_to_the_8_bit_file(run, tuned):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    tested = run(
        "test", f"ckpt_path={tuned.folder}", "compact=true", "export=onnx", "quantize=int8", "round_to=4",
        "benchmark=true", "runtime=[onnxruntime,eager]", "batch=[1,3]", "threads=1", "benchmark_seconds=1",
    )  # fmt: skip
    assert tested.code == 0, tested.err
    rows = {row["name"]: row for row in tested.results["artefacts"]}
    assert list(rows) == ["dense", "gated", "tuned", "compacted", "exported", "int8"]
    beside = tuned.last.parent
    names = {"compacted": "compacted.pt", "exported": "compacted.onnx", "int8": "compacted.int8.onnx"}
    for name, file in names.items():
        assert rows[name]["file"] == str(beside / file)
        assert rows[name]["megabytes"] == (beside / file).stat().st_size / 1e6
    for name in ("compacted", "exported"):
        assert rows[name]["figures"]["test_acc"] == pytest.approx(tested.results["test_acc"], abs=0.034)
    assert 0 <= rows["int8"]["figures"]["test_acc"] <= 1
    assert tested.results["ship"] in (rows["exported"]["file"], rows["int8"]["file"])
    assert ("not int8: " in tested.out) == (tested.results["ship"] == rows["exported"]["file"])
    both = {"onnxruntime": {"1", "3"}, "eager": {"1", "3"}}
    for name in ("dense", "gated", "tuned", "compacted"):
        assert {r: set(t) for r, t in rows[name]["milliseconds"].items()} == both
    for name in ("exported", "int8"):
        assert set(rows[name]["milliseconds"]) == {"onnxruntime"}
    assert "is the wrong way" in tested.out  # eager at a batch of one
    assert "1 thread," in tested.results["latency_settings"]
    page = (tested.folder / "report.html").read_text()
    assert "onnxruntime, batch 3 (ms)" in page
    assert "30 test examples of npz" in page
    lines = tested.out.splitlines()
    assert lines.index(next(x for x in lines if x.startswith("dense"))) < len(lines)


def test_8_bit_integers_are_shipped_where_they_are_faster_and_as_good():
    task = Classification(Form(4, (1, 8, 8)))

    def shipped(figures, times):
        rows = [Artefact("tuned", "last.ckpt", {"test_acc": 0.97}, 5, 5, 1.0)]
        for name, figure, ms in zip(("exported", "int8"), figures, times, strict=True):
            rows.append(Artefact(name, name, {"test_acc": figure}, 5, 5, 1.0, ms))
        why = against_int8(rows, task)
        said = table(rows, task, {"measured_on": "some examples", "ship": to_ship(rows, task)})
        assert ("not int8: " in said) == (why is not None)
        return to_ship(rows, task), why

    fast, slow = {"onnxruntime": {"1": 1.0, "32": 9.0}}, {"onnxruntime": {"1": 0.9, "32": 12.0}}
    assert shipped((0.97, 0.966), (slow, fast)) == ("int8", None)
    assert shipped((0.97, 0.966), (fast, slow)) == ("exported", "in 8-bit integers it is not faster")
    ship, why = shipped((0.97, 0.96), (slow, fast))
    assert ship == "exported"
    assert "0.9600 instead of 0.9700" in why
    two = {**slow, "openvino": {"1": 0.5, "32": 6.0}}  # each in the runtime that suits it
    assert shipped((0.97, 0.99), (fast, two))[0] == "int8"
    assert to_ship([Artefact("tuned", "last.ckpt", {}, 5, 5, 1.0)], task) == "last.ckpt"
    assert to_ship([Artefact("dense", None, {}, 5, 5, 1.0)], task) is None


def test_the_next_free_name_minds_files_of_its_own_kind(tmp_path):
    (tmp_path / "compacted.xml").touch()
    (tmp_path / "compacted.bin").touch()
    assert free_path(tmp_path / "compacted.pt2").name == "compacted.pt2"
    assert free_path(tmp_path / "compacted.xml").name == "compacted-1.xml"
    (tmp_path / "compacted-1.bin").touch()
    assert free_path(tmp_path / "compacted.xml").name == "compacted-2.xml"


@pytest.mark.costly
def test_wrong_input(run, trained):
    for arguments, message in (
        ([], "give the checkpoint to test"),
        (["ckpt_path=nowhere.ckpt"], "no such file"),
        ([f"ckpt_path={trained.last}", "export=tflite"], "onnx, openvino, pt2"),
        ([f"ckpt_path={trained.last}", "quantize=int8"], "give export=onnx, too"),
        ([f"ckpt_path={trained.last}", "quantize=int4", "export=onnx"], "int8"),
        ([f"ckpt_path={trained.last}", "benchmark=true", "runtime=[eager,jit]"], "expected one of eager, "),
        (
            [f"ckpt_path={trained.last}", "benchmark=true", "batch=[1,0]"],
            "batch=[1, 0]: expected",
        ),
        ([f"ckpt_path={trained.last}", "round_to=automatic"], "expected one of auto"),
        ([f"ckpt_path={trained.last}", "round_to=8"], "round_to=8 is of what is written"),
        ([f"ckpt_path={trained.last}", "runtime=eager"], "runtime=eager is of timings: give benchmark=true"),
        ([f"ckpt_path={trained.last}", "export=pt2", "batch=8"], "batch=8 is of timings"),
        ([f"ckpt_path={trained.last}", "compact=maybe"], "true or false"),
        ([f"ckpt_path={trained.last}", "data=digits"], "classes of images"),
        ([f"ckpt_path={trained.last}", "compakt=true"], "did you mean 'compact'"),
    ):
        outcome = run("test", *arguments)
        assert outcome.code == 2, (message, outcome.err)
        assert message in outcome.err
    assert not (trained.folder / "checkpoints" / "compacted.pt").exists()


def test_results_hold_what_the_contract_names(trained):
    results = json.loads(trained.path.read_text())
    expected = (
        "val_acc test_acc L_C0 expected_sparsity exact_sparsity parameters compacted_parameters macs "
        "compacted_macs gates open_gates lambda_l0 seed epochs seconds_per_epoch checkpoint"
    )
    assert set(expected.split()) <= results.keys()
    assert results["gates"] == 1312
    assert results["exact_sparsity"] == 1 - results["compacted_parameters"] / results["parameters"]
    assert results["expected_sparsity"] == pytest.approx(1 - results["L_C0"])


@pytest.mark.slow
def test_shrunk_in_one_shot(run, trained_once, tiny):
    trained = trained_once(*tiny, "trainer.max_epochs=1", "lambda_l0=1", "model.gate=all")
    first = run("test", f"ckpt_path={trained.last}", "compact=true", "trainer.enable_progress_bar=false")
    before = trained.last.with_name("compacted.pt").read_bytes()
    shrunk = run("test", f"ckpt_path={trained.last}", "shrink=0.5", "trainer.enable_progress_bar=false")
    assert shrunk.code == 0, shrunk.err
    results = shrunk.results
    assert results["shrunk"] != first.results["compacted"]
    assert trained.last.with_name("compacted.pt").read_bytes() == before
    rows = {row["name"]: row for row in results["artefacts"]}
    assert rows["shrunk"]["macs"] <= 0.5 * first.results["compacted_macs"]
    again = run("test", f"ckpt_path={results['shrunk']}", "trainer.enable_progress_bar=false")
    assert again.results["test_acc"] == results["shrunk_test_acc"]
    assert run("test", f"ckpt_path={trained.last}", "shrink=1.5").err.startswith("error: shrink=1.5")
