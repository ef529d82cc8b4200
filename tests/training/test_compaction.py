"""Compaction during training: faster epochs, the same checkpoints, and a resume that does not show."""

import pytest
import torch

from sparsereg.compression.shrink import SHUT
from sparsereg.training.callbacks import EpochTimer

from .test_resume import assert_same_weights

# Gates that hardly open from the start and a price that shuts them; temperatures that move.
CLOSING = [
    "model=lenet300",
    "lambda_l0=20",
    "droprate_init=0.9",
    "optimizer.lr=0.02",
    "optimizer.warmup_epochs=0",
    "temperature=exponential",
    "callbacks.compact_every_n_epochs=2",
    "callbacks.compact_below=0.2",
]


@pytest.fixture
def sizes(monkeypatch):
    """Parameters in the network while each epoch trains."""
    found = []
    stop = EpochTimer.on_train_batch_end

    def note(self, trainer, module, outputs, batch, batch_idx):
        if trainer.is_last_batch:
            found.append(sum(p.numel() for p in module.net.parameters()))
        stop(self, trainer, module, outputs, batch, batch_idx)

    monkeypatch.setattr(EpochTimer, "on_train_batch_end", note)
    return found


@pytest.mark.costly
@pytest.mark.parametrize(
    "model",
    [["model=lenet300"], pytest.param(["model=googlenet", "model.gate=all"], marks=pytest.mark.slow)],
)
def test_resumed_across_a_compaction_it_is_the_same_run(run, tiny, sizes, model):
    arguments = [*tiny, *CLOSING, *model]
    whole = run("train", *arguments, "trainer.max_epochs=5")
    assert whole.code == 0, whole.err
    assert sizes[0] == sizes[1] > sizes[2] >= sizes[3] >= sizes[4]
    weights = whole.weights()
    assert any((v == SHUT).any() for k, v in weights.items() if k.endswith("log_alpha"))
    for epochs in (2, 3):
        part = run("train", *arguments, f"trainer.max_epochs={epochs}")
        resumed = run("train", f"ckpt_path={part.last}", "resume_training=true", "trainer.max_epochs=5")
        assert resumed.code == 0, resumed.err
        assert_same_weights(weights, resumed.weights())
    optimizer = torch.load(whole.last, weights_only=True)["optimizer_states"][0]["state"]
    for i, state in torch.load(resumed.last, weights_only=True)["optimizer_states"][0]["state"].items():
        assert all(torch.equal(v, optimizer[i][k]) for k, v in state.items())


@pytest.mark.costly
def test_counts_are_those_of_the_original(run, tiny, sizes):
    trained = run("train", *tiny, *CLOSING, "trainer.max_epochs=4")
    full = trained.results["parameters"] + trained.results["gates"]
    assert sizes[-1] < sizes[0] == full
    without = run("train", *tiny, *CLOSING, "trainer.max_epochs=1", "callbacks.compact_every_n_epochs=0")
    for key in ("parameters", "gates", "macs"):
        assert trained.results[key] == without.results[key]
    tested = run("test", f"ckpt_path={trained.last}", "compact=true")
    assert tested.code == 0, tested.err
    for key in ("test_acc", "L_C0", "exact_sparsity", "parameters", "compacted_parameters", "open_gates"):
        assert tested.results[key] == trained.results[key], key
    assert tested.results["compacted_test_acc"] == pytest.approx(tested.results["test_acc"])


@pytest.mark.costly
def test_validation_amid_an_epoch_a_target_and_fine_tuning(run, tiny, sizes):
    outcome = run(
        "train",
        *tiny,
        *[a for a in CLOSING if not a.startswith("lambda_l0")],
        "target_sparsity=0.9",
        "trainer.max_epochs=4",
        "trainer.val_check_interval=0.5",
        "finetune.epochs=1",
    )
    assert outcome.code == 0, outcome.err
    assert outcome.results["exact_sparsity"] >= 0.9
    assert sizes[3] < sizes[0]


@pytest.mark.costly
def test_wrong_input(run, tiny):
    for arguments, message in (
        (["callbacks.compact_every_n_epochs=-1"], "an integer >= 0"),
        (["callbacks.compact_below=0.5"], "a probability in (0, 0.5)"),
        (["ema_decay=0.9"], "ema_decay=0.9 do not go together"),
        (["penalty=weights"], "penalty=weights do not go together"),
        (["trainer.compile=true"], "trainer.compile=true do not go together"),
        (["trainer=ddp"], "trainer.strategy=ddp do not go together"),
        (["model=sparse_mlp"], "no gate of this network is on a channel that can leave"),
    ):
        outcome = run(
            "train", *tiny, "trainer.max_epochs=1", "callbacks.compact_every_n_epochs=1", *arguments
        )
        assert outcome.code == 2, (message, outcome.err)
        assert message in outcome.err
