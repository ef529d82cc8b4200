"""SparsifyTrainer in Trainers of Hugging Face, on tiny configurations with random weights."""

import warnings

import pytest
import torch
from torch.utils.data import Dataset

import sparsereg
from sparsereg.compression import load_compacted

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

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


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2, "bf16": True}])
def test_resumed_bitwise(tmp_path, changes):
    ends = []
    for name in ("whole", "cut"):
        made = trainer(
            tmp_path / name, bert(), Texts(), **changes, max_steps=9, save_strategy="steps", save_steps=3
        )
        SparsifyTrainer(made, target_macs=0.5)
        if name == "cut":
            made.add_callback(StopAt(4))
            made.train()
            made = trainer(tmp_path / name, bert(), Texts(), **changes, max_steps=9)
            torch.manual_seed(99)
            sparsify = SparsifyTrainer(made, target_macs=0.5)
            made.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-3"))
            assert sparsify.sparsifier.num_steps == 9
        else:
            made.train()
        ends.append(made.model.state_dict())
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


class StopAt(transformers.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


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
