"""Fine-tuning: from a plain network to gates, and every way in which a checkpoint does not fit."""

import pytest
import torch

from sparsereg.distributions import p_active


@pytest.fixture
def plain(trained_once, tiny):
    return trained_once(*tiny, "trainer.max_epochs=1", "without_using_gate=true")


@pytest.mark.costly
def test_gates_open_at_droprate_init_and_are_named(run, tiny, plain):
    tuned = run(
        "train",
        f"ckpt_path={plain.last}",
        "lambda_l0=0",
        "droprate_init=0.05",
        "trainer.max_epochs=0",
        *tiny[6:],
    )
    assert tuned.code == 0, tuned.err
    assert "initialised anew at droprate_init=0.05" in tuned.err
    assert "branch1x1.norm.gate.gates.log_alpha" in tuned.err
    expected = p_active(torch.tensor(2.9444)).item()
    assert tuned.results["L_C0"] == pytest.approx(expected, abs=1e-3)
    assert tuned.results["parameters"] == plain.results["parameters"]


@pytest.mark.costly
def test_fine_tuning_starts_from_the_weights(run, tiny, plain):
    tuned = run("train", f"ckpt_path={plain.last}", "droprate_init=0.05", "trainer.max_epochs=1", *tiny[6:])
    assert tuned.code == 0, tuned.err
    fresh = run("train", *tiny, "droprate_init=0.05", "trainer.max_epochs=1")
    before = plain.weights()["net.classifier.weight"]
    change = (tuned.weights()["net.classifier.weight"] - before).norm()
    assert change < (fresh.weights()["net.classifier.weight"] - before).norm()
    assert tuned.results["gates"] == 832


def test_a_plain_run_counts_no_gates(plain):
    assert plain.code == 0, plain.err
    results = plain.results
    assert results["gates"] == results["open_gates"] == 0
    assert results["exact_sparsity"] == results["expected_sparsity"] == 0
    assert results["L_C0"] is None
    assert results["lambda_l0"] is None
    assert results["compacted_parameters"] == results["parameters"]


@pytest.mark.costly
def test_checkpoints_that_do_not_fit(run, tiny, plain, tmp_path):
    gated = run("train", *tiny, "trainer.max_epochs=1")
    cases = {
        "has gates, but without_using_gate=true": [f"ckpt_path={gated.last}", "without_using_gate=true"],
        "can only be resumed with without_using_gate=true": [
            f"ckpt_path={plain.last}",
            "resume_training=true",
        ],
        "no such file": ["ckpt_path=nowhere.ckpt"],
        "is of model=googlenet, not of model=lenet5": [f"ckpt_path={plain.last}", "model=lenet5"],
        "give ckpt_path=": ["resume_training=true"],
    }
    truncated = tmp_path / "truncated.ckpt"
    truncated.write_bytes(plain.last.read_bytes()[:5000])
    cases["cannot be read as a checkpoint"] = [f"ckpt_path={truncated}"]
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {}}, foreign)
    cases["not a checkpoint that train.py wrote"] = [f"ckpt_path={foreign}"]
    before = sorted(p.name for p in gated.folder.parent.iterdir())
    for message, arguments in cases.items():
        outcome = run("train", *arguments)
        assert outcome.code == 2, (message, outcome.err)
        (line,) = [x for x in outcome.err.splitlines() if x.startswith("error: ")]
        assert message in line
        assert "Traceback" not in outcome.err
    assert sorted(p.name for p in gated.folder.parent.iterdir()) == before


def test_other_classes_do_not_fit(run, plain):
    outcome = run("train", f"ckpt_path={plain.last}", "data=digits", "trainer=cpu")
    assert outcome.code == 2
    assert "stem.conv.weight" in outcome.err
