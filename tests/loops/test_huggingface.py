"""SparsifyTrainer in Trainers of Hugging Face, on tiny configurations with random weights."""

import copy
import warnings

import pytest
import torch
from torch.utils.data import Dataset

import sparsereg
from sparsereg.compression import load_compacted
from sparsereg.compression.batch_norm_folding import fuse
from sparsereg.compression.timing.measured import TOLERANCE
from tests.states import assert_same

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from safetensors.torch import load_file  # noqa: E402

from sparsereg import SparsifyTrainer  # noqa: E402


@pytest.fixture(autouse=True)
def _warnings_of_others():
    with warnings.catch_warnings():
        for module in ("transformers", "accelerate", "torch"):
            warnings.filterwarnings("ignore", module=module)
        yield


class Texts(Dataset):
    """Texts of which the first token says the class."""

    def __len__(self):
        return 64

    def __getitem__(self, i):
        draws = torch.Generator().manual_seed(i)
        ids = torch.randint(2, 40, (12,), generator=draws)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": int(ids[0] > 20)}


class Images(Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, i):
        draws = torch.Generator().manual_seed(i)
        return {"pixel_values": torch.randn(3, 16, 16, generator=draws), "labels": i % 2}


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=16, num_labels=2,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def resnet():
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2
    )
    return transformers.ResNetForImageClassification(config)


def trainer(folder, model, data, **changes):
    usual = {"output_dir": str(folder), "per_device_train_batch_size": 8, "num_train_epochs": 3}
    usual |= {
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "epoch",
        "learning_rate": 1e-3,
    }
    args = transformers.TrainingArguments(**(usual | changes))
    return transformers.Trainer(model=model, args=args, train_dataset=data)


def share(sparsify):
    counted = sparsereg.count(sparsify.model, sparsify.sparsifier.example)
    return counted.compacted_macs / counted.macs


def test_three_lines(tmp_path):
    made = trainer(tmp_path, bert(), Texts())
    sparsify = SparsifyTrainer(made, target_macs=0.5)
    made.train()
    assert 0.4 < share(sparsify) <= 0.5
    batch = {name: value[None] for name, value in Texts()[3].items() if name != "labels"}
    whole = made.model.eval()(**batch).logits
    for small in (sparsify.compacted, load_compacted(tmp_path / "compacted.pt")):
        torch.testing.assert_close(small(**batch)["logits"], whole, rtol=1e-4, atol=1e-5)
    groups = made.optimizer.param_groups
    assert [len(g["params"]) for g in groups if "gate_lr" in g] == [len(sparsify.sparsifier.gates)]
    assert made.lr_scheduler.get_last_lr()[0] < 1e-4


def test_milliseconds_are_met_by_what_is_measured(milliseconds, tmp_path):
    made = trainer(tmp_path, bert(), Texts())
    asked = 0.8 * milliseconds(made.model)
    sparsify = SparsifyTrainer(made, target_latency_ms=asked, runtime="eager", batch=4)
    made.train()
    assert sparsify.sparsifier.budget.reached == pytest.approx(asked, rel=TOLERANCE)
    assert milliseconds(fuse(sparsify.compacted)) == pytest.approx(sparsify.sparsifier.budget.reached)


class Seen(transformers.TrainerCallback):
    """What there is when a checkpoint is written, and when training begins."""

    def __init__(self, sparsify, stop=None):
        self.sparsify, self.stop, self.states = sparsify, stop, {}

    def note(self, state, optimizer):
        parts = (
            self.sparsify.model.state_dict(),
            optimizer.state_dict(),
            self.sparsify.sparsifier.state_dict(),
        )
        self.states[state.global_step] = copy.deepcopy(parts)

    def on_save(self, args, state, control, optimizer=None, **kwargs):
        self.note(state, optimizer)

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self.note(state, optimizer)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.stop:
            control.should_training_stop = True


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2, "bf16": True}])
def test_resumed_run_begins_with_gates_and_multiplier_of_the_checkpoint(tmp_path, changes):
    saved = {"max_steps": 9, "save_strategy": "steps", "save_steps": 6, **changes}
    first = trainer(tmp_path, bert(), Texts(), **saved)
    before = Seen(SparsifyTrainer(first, target_macs=0.2), stop=7)
    first.add_callback(before)
    first.train()
    again = trainer(tmp_path, bert(), Texts(), **saved)
    sparsify = SparsifyTrainer(again, target_macs=0.2)
    after = Seen(sparsify)
    again.add_callback(after)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert min(after.states) == 6
    assert before.states[6][2]["budget"]["integral"] > 0
    assert_same(before.states[6], after.states[6])
    assert sparsify.sparsifier.num_steps == 9
    assert 0.1 < share(sparsify) <= 0.2


def test_statistics_of_convolutions_are_taken_anew(tmp_path):
    made = trainer(tmp_path, resnet(), Images(), save_strategy="no", num_train_epochs=2)
    sparsify = SparsifyTrainer(made, target_macs=0.6)
    made.train()
    assert share(sparsify) <= 0.6
    conv, norm = next(
        (m.convolution, m.normalization) for m in sparsify.model.modules() if hasattr(m, "normalization")
    )
    x = torch.stack([Images()[i]["pixel_values"] for i in range(32)])
    mean = torch.stack([conv(x[i : i + 8]).mean((0, 2, 3)) for i in range(0, 32, 8)]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-3, atol=1e-4)


def test_without_data_an_example_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match="no train_dataset to take an example from: give example="):
        SparsifyTrainer(trainer(tmp_path, bert(), None), target_macs=0.5)


def test_one_shot_goes_before_the_first_step(tmp_path):
    made = trainer(tmp_path, bert(), Texts())
    sparsify = SparsifyTrainer(made, target_sparsity=0.5, one_shot=True)
    made.train()
    assert all(bool((location.abs() == 20).all()) for location in sparsify.sparsifier.gates)
    counted = sparsereg.count(sparsify.model, sparsify.sparsifier.example)
    assert 0.45 < counted.compacted_parameters / counted.parameters <= 0.5
    resumed = trainer(tmp_path, bert(), Texts(), num_train_epochs=4)
    again = SparsifyTrainer(resumed, target_sparsity=0.5, one_shot=True)
    resumed.train(resume_from_checkpoint=True)
    shapes = [[p.shape for p in found.compacted.parameters()] for found in (sparsify, again)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("one_shot", [False, True])
def test_one_shape_for_all_layers_comes_back_as_a_model_of_its_own_class(tmp_path, one_shot):
    made = trainer(tmp_path, bert(), Texts())
    uniform = {"shape": "uniform", "layers": "*.intermediate.dense", "one_shot": one_shot}
    sparsify = SparsifyTrainer(made, target_sparsity=0.2, families="units", **uniform)
    made.train()
    restored = sparsereg.restore_class(sparsify.compacted, bert().eval(), sparsify.sparsifier.example)
    restored.save_pretrained(tmp_path / "smaller")
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "smaller").eval()
    inputs = {"input_ids": torch.arange(12).view(1, 12) + 2, "attention_mask": torch.ones(1, 12).long()}
    expected = sparsify.compacted(**inputs)["logits"]
    torch.testing.assert_close(again(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    left = [sum(p.numel() for p in net.parameters()) for net in (again, sparsify.compacted, bert())]
    assert left[0] == left[1] <= 0.8 * left[2]


def test_a_model_with_gates_is_saved_with_them(tmp_path):
    example = {"input_ids": torch.randint(2, 40, (2, 12))}
    gated = sparsereg.gate(bert(), example)
    run = trainer(tmp_path / "run", gated, Texts(), num_train_epochs=1)
    run.train()  # it saves at the end of the epoch
    gated.eval().save_pretrained(tmp_path / "gated")
    plain = type(gated).from_pretrained(tmp_path / "gated").eval()
    again = sparsereg.gate(plain, example).eval()
    weights = load_file(tmp_path / "gated" / "model.safetensors")
    assert not again.load_state_dict(weights, strict=False).unexpected_keys
    assert torch.equal(again(**example).logits, gated(**example).logits)
    assert not torch.equal(plain(**example).logits, gated(**example).logits)
