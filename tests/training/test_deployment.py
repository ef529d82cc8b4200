"""test.py: measures what training measured, compacts, and the compacted network can be trained further."""

import json

import pytest
import torch

from sparsereg.compression import load_compacted
from sparsereg.layers import load_csr


@pytest.fixture
def trained(run, tiny):
    outcome = run(
        "train",
        *tiny,
        "trainer.max_epochs=2",
        "lambda_l0=30",
        "optimizer.lr=0.05",
        "optimizer.warmup_epochs=0",
        "model.gate=all",
    )
    assert outcome.code == 0, outcome.err
    return outcome


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


def test_wrong_input(run, trained):
    for arguments, message in (
        ([], "give the checkpoint to test"),
        (["ckpt_path=nowhere.ckpt"], "no such file"),
        ([f"ckpt_path={trained.last}", "export=tflite"], "onnx, pt2"),
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
