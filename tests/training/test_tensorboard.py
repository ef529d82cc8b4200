"""TensorBoard: tags in groups, gates as pictures, settings beside results, runs told apart."""

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from sparsereg.training.tensorboard import gate_map, in_order, name_by_overrides, tag_of

PROMISED = {
    "train_loss", "acc_loss", "L_C0", "train_acc", "val_acc", "test_acc", "expected_sparsity",
    "exact_sparsity", "temperature",
}  # fmt: skip


@pytest.mark.costly
def test_a_run_in_tensorboard(run, tiny):
    trained = run("train", "-m", *tiny, "model=lenet300", "trainer.max_epochs=1", "lambda_l0=0.5,1")
    assert trained.code == 0, trained.err
    folder = Path("outputs/train/tblog/lightning_logs/version_0")
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    scalars = {tag for tag in tags["scalars"] if not tag.startswith("final/")}
    assert {tag.rpartition("/")[2] for tag in scalars} >= PROMISED
    groups = {tag.partition("/")[0] for tag in scalars if not tag.startswith("lr")}
    assert groups <= {"train", "val", "test", "gates", "epoch"}
    assert "val/val_acc" in scalars
    assert [tag for tag in tags["images"] if tag.startswith("gates/map/")]
    assert [tag for tag in tags["histograms"] if tag.startswith("gates/p_active/")]
    content = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    experiment = plugin_data_pb2.HParamsPluginData.FromString(content).experiment
    assert [metric.name.tag for metric in experiment.metric_infos][:3] == [
        "final/test_acc", "final/val_acc", "final/exact_sparsity",
    ]  # fmt: skip
    assert experiment.hparam_infos[0].name == "lambda_l0"  # what the sweep goes over
    link, _ = sorted(Path("outputs/train/tblog/by_overrides").iterdir())
    assert "lambda_l0=0.5" in link.name
    assert link.resolve() == folder.resolve()
    shown = EventAccumulator(str(link)).Reload()
    assert shown.Tags()["scalars"] == tags["scalars"]


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("val_acc", "val/val_acc"),
        ("L_C0", "gates/L_C0"),
        ("open_gates/layers.0", "gates/open_gates/layers.0"),
        ("lambda_target", "target/lambda_target"),
        ("final/val_acc", "final/val_acc"),
        ("lr-AdamW/gates", "lr-AdamW/gates"),
        ("something_of_a_user", "train/something_of_a_user"),
        ("epoch", "epoch"),
    ],
)
def test_tags(name, tag):
    assert tag_of(name) == tag


@pytest.mark.parametrize(
    ("shape", "picture"),
    [
        ((784,), (1, 112, 112)),  # 28 x 28 pixels, each drawn as 4 x 4
        ((1,), (1, 128, 128)),
        ((5,), (1, 84, 126)),
        ((300, 784), (1, 256, 256)),
        ((20, 1, 1, 1), (1, 100, 125)),
        ((6, 4, 3, 3), (1, 18, 108)),
    ],
)
def test_maps_of_gates_are_pictures_of_sensible_size(shape, picture):
    shown = gate_map(torch.linspace(0, 1, torch.Size(shape).numel()).reshape(shape))
    assert tuple(shown.shape) == picture
    assert 0 <= shown.min() <= shown.max() <= 1


def test_settings_that_the_user_named_come_first():
    settings = {"a": 1, "optimizer/lr": 2, "optimizer/name": 3, "seed": 4}
    assert list(in_order(settings, ["seed", "optimizer.lr", "unknown"])) == [
        "seed", "optimizer/lr", "a", "optimizer/name",
    ]  # fmt: skip
    assert list(in_order(settings, ["optimizer"]))[:2] == ["optimizer/lr", "optimizer/name"]


def test_names_of_runs_are_names_of_folders(tmp_path):
    folder = tmp_path / "lightning_logs" / "version_3"
    folder.mkdir(parents=True)
    link = name_by_overrides(folder, ["+data.path=/somewhere/x.npz", "lambda_l0=0.5"])
    assert link.name == "data.path=_somewhere_x.npz,lambda_l0=0.5 (version_3)"
    assert link.resolve() == folder.resolve()
    assert name_by_overrides(folder, []).name == "defaults (version_3)"
    assert name_by_overrides(folder, []) is None  # it is there, and stays
    assert len(name_by_overrides(folder, ["a=" + "x" * 500]).name) < 200
