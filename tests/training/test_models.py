"""Every network trains, on images of any shape, with and without gates."""

import pytest
import torch

from sparsereg.data.form import Form
from sparsereg.penalties import expected_l2
from sparsereg.zoo.networks import build

from .conftest import write_images

QUICK = ["data.batch_size=16", "data.val_size=24", "trainer=cpu", "trainer.max_epochs=1"]
QUIET = ["trainer.enable_progress_bar=false", "callbacks.batch_norm.num_images=32"]


GATED = {"googlenet", "lenet300", "lenet5", "sparse_mlp", "torchvision"}


@pytest.mark.costly
@pytest.mark.parametrize("model", sorted(GATED))
def test_every_network_trains_and_is_tested(run, tmp_path, model):
    grey = write_images(tmp_path / "grey.npz", channels=1, size=12)
    data = ["data=npz", f"data.path={grey}"]
    trained = run("train", *data, *QUICK, *QUIET, f"model={model}", "lambda_l2=1e-4")
    assert trained.code == 0, trained.err
    assert trained.results["gates"] > 0
    tested = run("test", f"ckpt_path={trained.last}", "compact=true")
    assert tested.code == 0, tested.err
    assert tested.results["test_acc"] == trained.results["test_acc"]
    assert tested.results["compacted_test_acc"] == pytest.approx(tested.results["test_acc"], abs=1e-6)


@pytest.mark.costly
def test_l2_inside_l0_is_in_the_loss(run, tiny):
    with_l2 = run("train", *tiny, "trainer.max_epochs=1", "model=lenet300", "lambda_l2=10")
    without = run("train", *tiny, "trainer.max_epochs=1", "model=lenet300")
    norms = [
        sum(v.square().sum() for k, v in outcome.weights().items() if k.endswith("weight"))
        for outcome in (with_l2, without)
    ]
    assert norms[0] < norms[1]


def test_expected_l2_of_open_and_shut_gates():
    net = build({"name": "lenet300", "sampling": "batch"}, Form(10, (1, 8, 8)), gated=True, droprate_init=0.5)
    weights = [p for n, p in net.named_parameters() if n.endswith("weight")]
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "log_alpha" in name:
                p.fill_(30.0)
    assert expected_l2(net).item() == pytest.approx(sum(w.square().sum().item() for w in weights), rel=1e-5)


def test_unknown_network_and_key():
    form = Form(10, (3, 8, 8))
    with pytest.raises(ValueError, match="did you mean 'lenet5'"):
        build({"name": "lenet"}, form, gated=True)
    with pytest.raises(ValueError, match="width"):
        build({"name": "googlenet", "gate": "all", "width": 3}, form, gated=True)
