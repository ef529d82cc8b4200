"""Runs of train.py and test.py on texts, masks and dictionaries, with tasks built in and of the user."""

import json
import textwrap

import numpy as np
import pytest
import torch

QUICK = ["trainer=cpu", "trainer.enable_progress_bar=false", "logger=none", "without_using_gate=true"]
TINY = ["model=gpt", "model.width=16", "model.depth=1", "model.heads=2"]
SHORT = ["data.context=16", "data.train_windows=24", "data.eval_windows=8", "data.batch_size=8"]


def refused(outcome, *said):
    assert outcome.code == 2, outcome.out + outcome.err
    (line,) = outcome.err.strip().splitlines()
    assert line.startswith("error: ")
    for part in said:
        assert part in line


@pytest.fixture
def text(tmp_path):
    words = np.random.default_rng(0).choice(["one ", "two ", "three ", "\n"], 4000)
    (tmp_path / "words.txt").write_text("".join(words))
    return ["data=text", f"data.path={tmp_path / 'words.txt'}"]


@pytest.mark.costly
def test_a_language_model_is_trained_tested_and_resumed_bitwise(run, text):
    given = [*text, *TINY, *SHORT, *QUICK]
    whole = run("train", *given, "trainer.max_epochs=2", "optimizer.warmup_epochs=0")
    assert whole.code == 0, whole.err
    results = whole.results
    assert results["task"] == "language_model"
    assert results["objective"] == "val_bits_per_byte"
    assert 0 < results["test_bits_per_byte"] < 9
    assert 0 <= results["test_acc"] <= 1
    net = torch.load(whole.last, weights_only=True)["state_dict"]
    assert results["parameters"] == sum(v.numel() for k, v in net.items() if k != "net.head.weight")
    assert results["macs"] > 16 * 12 * 16**2
    assert "test_bits_per_byte" in whole.out

    tested = run("test", f"ckpt_path={whole.last}", "trainer=cpu", "trainer.enable_progress_bar=false")
    assert tested.code == 0, tested.err
    for name in ("val_bits_per_byte", "test_bits_per_byte", "test_acc"):
        assert tested.results[name] == results[name]

    half = run("train", *given, "trainer.max_epochs=1", "optimizer.warmup_epochs=0")
    resume = [f"ckpt_path={half.last}", "resume_training=true", "trainer.max_epochs=2", *QUICK]
    resumed = run("train", *resume)
    assert resumed.code == 0, resumed.err
    for name, value in whole.weights().items():
        assert torch.equal(value, resumed.weights()[name]), name
    refused(run("train", *resume, "data.context=8"), "data.context was 16, is 8")
    refused(run("train", *resume, "task=text_classification"), "text_classification")


def test_the_best_language_model_has_the_fewest_bits(run, text):
    given = [*text, *TINY, *SHORT, *QUICK, "trainer.max_epochs=3", "optimizer.lr=0.02"]
    best = run("train", *given, "test_checkpoint=best")
    assert best.code == 0, best.err
    state = torch.load(best.last, weights_only=True)["callbacks"]
    (checkpoint,) = (v for k, v in state.items() if k.startswith("BestCheckpoint"))
    assert best.results["val_bits_per_byte"] == pytest.approx(float(checkpoint["best_model_score"]), rel=1e-5)
    assert best.results["val_acc"] is not None


def test_what_is_not_named_goes_with_what_is(run, text):
    config = run("train", "--cfg", "job", "data=text").out
    assert "name: gpt" in config
    config = run("train", "--cfg", "job", "task=language_model").out
    assert "name: gpt" in config
    assert "name: text" in config
    assert "name: text" in run("train", "--cfg", "job", "model=gpt").out


PAIRS = [
    ("model=gpt data=digits", "model=gpt is for task=language_model or text_classification, data=digits for"),
    ("model=lenet5 data=text", "model=lenet5 is for task=classification, data=text for task=language_model"),
    ("data=digits task=segmentation", "data=digits has labels for task=classification, not for"),
    ("data=text task=classification", "data=text has labels for task=language_model, not for task=class"),
    ("data=digits model=unet", "model=unet is for task=segmentation, data=digits for task=classification"),
    ("task=language_modell", "did you mean 'language_model'"),
    ("task._target_=no_such.Task data=digits", "task._target_=no_such.Task: there is no module"),
    ("data=text model=gpt objective=val_mean_io", "did you mean 'val_mean_iou'"),
    ("data=text model=gpt model.width=30", "model.width=30 is no multiple of model.heads=4"),
    ("model=huggingface data=text", "needs model.config=FILE.json, a local folder, or a type"),
    ("model=huggingface model.config=bert-base-uncased data=text", "names on the Hugging Face hub are not"),
    (
        "model=huggingface model.name=gpt2 +model.n_embd=16 +model.n_head=2 +model.n_positions=8 data=text",
        "its max_position_embeddings=8 are fewer than data.context=128",
    ),
]


@pytest.mark.costly
@pytest.mark.parametrize(("given", "said"), PAIRS)
def test_what_does_not_go_together_is_one_line(run, tmp_path, given, said):
    (tmp_path / "bytes").write_bytes(bytes(range(256)) * 40)
    path = [f"data.path={tmp_path / 'bytes'}"] if "data=text" in given else []
    refused(run("train", *QUICK, *given.split(), *path), said)


@pytest.fixture
def masks(tmp_path):
    """Bright squares on a dark ground, their middle pixel without a class."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, num in (("train", 48), ("test", 16)):
        images, labels = rng.integers(0, 60, (num, 16, 16, 1)), np.zeros((num, 16, 16), dtype=np.uint8)
        for k in range(num):
            y, x = rng.integers(0, 10, 2)
            images[k, y : y + 6, x : x + 6] += 150
            labels[k, y : y + 6, x : x + 6] = 1
            labels[k, y + 3, x + 3] = 255
        arrays[f"{part}_images"], arrays[f"{part}_masks"] = images.astype(np.uint8), labels
    np.savez(tmp_path / "masks.npz", **arrays)
    return ["data=npz", f"data.path={tmp_path / 'masks.npz'}", "data.batch_size=8"]


@pytest.mark.costly
def test_masks_are_learnt(run, masks):
    given = [*masks, "model=unet", "model.width=8", "model.depth=2", *QUICK, "trainer.max_epochs=15"]
    trained = run(
        "train", *given, "data.augment.flip=true", "optimizer.lr=0.01", "optimizer.schedule_epochs=15"
    )
    assert trained.code == 0, trained.err
    assert trained.results["task"] == "segmentation"
    assert trained.results["test_mean_iou"] > 0.6  # all ground is 0.44
    tested = run("test", f"ckpt_path={trained.last}", "compact=true", "trainer=cpu")
    assert tested.code == 0, tested.err
    assert tested.results["test_mean_iou"] == trained.results["test_mean_iou"]
    assert tested.results["compacted_test_mean_iou"] == pytest.approx(
        tested.results["test_mean_iou"], abs=1e-6
    )
    refused(
        run("train", *masks, "model=lenet5", *QUICK), "model=lenet5 has a network for task=classification"
    )


@pytest.mark.costly
def test_segmentation_networks_of_torchvision(run, masks):
    name = "model.name=lraspp_mobilenet_v3_large"
    trained = run("train", *masks, "model=torchvision", name, *QUICK, "trainer.max_epochs=1")
    assert trained.code == 0, trained.err
    assert 0 <= trained.results["test_mean_iou"] <= 1
    refused(run("train", *masks, "model=torchvision", *QUICK), "no segmentation network of that name")


@pytest.mark.costly
def test_texts_with_classes(run, tmp_path):
    rows = ["text,label"]
    rng = np.random.default_rng(0)
    for k in range(120):
        words = rng.choice(["up", "yes", "good"] if k % 2 else ["down", "no", "bad"], 1 + k % 7)
        rows.append(f'"{" ".join(words)}, {k}",{"glad" if k % 2 else "sad"}')
    (tmp_path / "texts.csv").write_text("\n".join(rows) + "\n")
    table = ["data=labelled_text", f"data.path={tmp_path / 'texts.csv'}", "data.batch_size=16"]
    given = [
        *table,
        *TINY,
        *QUICK,
        "trainer.max_epochs=5",
        "optimizer.lr=0.01",
        "optimizer.schedule_epochs=5",
    ]
    trained = run("train", *given)
    assert trained.code == 0, trained.err
    assert trained.results["task"] == "text_classification"
    assert trained.results["test_acc"] > 0.8
    tested = run("test", f"ckpt_path={trained.last}", "trainer=cpu")
    assert tested.results["test_acc"] == trained.results["test_acc"]
    for k, line in enumerate(rows[1:41]):
        folder = tmp_path / "folder" / line.rpartition(",")[2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{k}.txt").write_text(line)
    folders = run("train", "data=labelled_text", f"data.path={tmp_path / 'folder'}", *TINY, *QUICK,
                  "trainer.max_epochs=1")  # fmt: skip
    assert folders.code == 0, folders.err
    assert folders.results["data"]["num_test"] == 4
    refused(run("train", *table, *TINY, *QUICK, "data.label=class"), "expected one column 'class'")
    refused(run("train", "data=labelled_text", *TINY, *QUICK), "needs a table or a folder")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Data, networks and a task of the user's: dictionaries go in, dictionaries come out."""
    (tmp_path / "own_things.py").write_text(
        textwrap.dedent("""
        import pytorch_lightning as pl
        import torch
        import torch.nn.functional as F
        from torch import nn
        from torch.utils.data import DataLoader
        from torchmetrics import MeanSquaredError
        from sparsereg.training.tasks.task import Task

        class Rows(torch.utils.data.Dataset):
            def __init__(self, num, kind):
                self.num, self.kind = num, kind
                self.x = torch.randn(num, 5, generator=torch.Generator().manual_seed(num))
            def __len__(self):
                return self.num
            def __getitem__(self, k):
                x = self.x[k]
                if self.kind == "float":
                    return {"x": x, "id": torch.tensor([k]), "labels": x.sum()}
                return {"x": x, "id": torch.tensor([k]), "labels": (x.sum() > 0).long()}

        class Data(pl.LightningDataModule):
            def __init__(self, kind="class"):
                super().__init__()
                self.kind = kind
            def train_dataloader(self):
                return DataLoader(Rows(64, self.kind), 16)
            def val_dataloader(self):
                return DataLoader(Rows(33, self.kind), 16)
            def test_dataloader(self):
                return DataLoader(Rows(32, self.kind), 16)

        class Net(nn.Module):
            def __init__(self, num_classes, wide=False):
                super().__init__()
                self.body = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, num_classes))
            def forward(self, x):
                return {"logits": self.body(x), "hidden": x}

        class Regression(Task):
            def __init__(self, scale=1.0):
                self.scale = scale
            def loss(self, predictions, labels):
                return self.scale * F.mse_loss(predictions.squeeze(1), labels)
            def predictions(self, answer, labels):
                return answer["logits"].squeeze(1).unsqueeze(1), labels
            def metrics(self):
                return {"mse": Squared()}

        class Squared(MeanSquaredError):
            def update(self, predictions, labels):
                super().update(predictions.squeeze(1).contiguous(), labels)

        class NoLoss(Task):
            pass
        """)
    )
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    yield tmp_path
    __import__("sys").modules.pop("own_things", None)


OWN = ["data._target_=own_things.Data", "model._target_=own_things.Net"]


def test_dictionaries_go_in_and_out(run, own):
    trained = run("train", *OWN, *QUICK, "trainer.max_epochs=2")
    assert trained.code == 0, trained.err
    assert trained.results["task"] == "classification"
    stored = torch.load(trained.last, weights_only=True)["sparsereg"]
    assert stored["inputs"] == {"x": ["float32", [5]]}  # the network takes no id
    tested = run("test", f"ckpt_path={trained.last}", *OWN, "trainer=cpu")
    assert tested.code == 0, tested.err
    assert tested.results["test_acc"] == trained.results["test_acc"]


@pytest.mark.costly
def test_a_task_of_the_users(run, own):
    task = "task._target_=own_things.Regression"
    given = [*OWN, "data.kind=float", *QUICK]
    trained = run("train", *given, task, "task.scale=2.0", "trainer.max_epochs=2", "test_checkpoint=best")
    assert trained.code == 0, trained.err
    assert trained.results["objective"] == "val_mse"
    assert trained.results["test_mse"] > 0
    again = run("test", f"ckpt_path={trained.last}", *OWN, "trainer=cpu")
    refused(again, f"add {task}")
    tested = run("test", f"ckpt_path={trained.results['checkpoint']}", *OWN, task, "trainer=cpu")
    assert tested.code == 0, tested.err
    assert tested.results["test_mse"] == pytest.approx(trained.results["test_mse"], rel=1e-5)
    refused(run("train", *given), "its labels are of none of the tasks")
    refused(
        run("train", *given, "task._target_=own_things.NoLoss"), "expected a method loss(predictions, labels)"
    )
    refused(
        run("train", *given, "task._target_=own_things.Net"), "expected a sparsereg.training.tasks.task.Task"
    )
    refused(run("train", *given, task, "label_smoothing=0.1"), "takes no label_smoothing")


@pytest.mark.costly
def test_a_sweep_over_a_language_model(run, text):
    swept = run("train", "-m", *text, *TINY, *SHORT, *QUICK, "trainer.max_epochs=1", "seed=0,1")
    assert swept.code == 0, swept.err
    header, *rows = swept.path.read_text().splitlines()
    assert "test_bits_per_byte" in header.split(",")
    assert len(rows) == 2
    assert json.loads((swept.path.parent / "0" / "job.json").read_text())["status"] == "finished"
