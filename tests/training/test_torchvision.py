"""Networks of torchvision: gated, trained, tested, compacted, exported, resumed, fine-tuned."""

import pytest
import torch

from sparsereg.compression import load_compacted
from sparsereg.data.form import Form
from sparsereg.errors import InputError
from sparsereg.zoo.networks import build
from sparsereg.zoo.torchvision import load_weights_file_, torchvision_network

MODEL = ["model=torchvision", "model.small_images=true"]
SETTINGS = {"source": "torchvision", "weights": None, "small_images": False, "residual": True}


@pytest.fixture
def quick(tiny: list[str]) -> list[str]:
    return [*tiny, *MODEL, "data.batch_size=32", "trainer.max_epochs=1"]


@pytest.mark.costly
def test_resnet18_from_training_to_the_file_that_is_shipped(run, quick):
    trained = run("train", *quick, "lambda_l0=30", "optimizer.lr=0.05", "optimizer.warmup_epochs=0")
    assert trained.code == 0, trained.err
    assert trained.results["gates"] == 2880
    pytest.importorskip("onnxscript")
    tested = run("test", f"ckpt_path={trained.last}", "compact=true", "export=onnx")
    assert tested.code == 0, tested.err
    for key in ("val_acc", "test_acc", "L_C0", "exact_sparsity", "compacted_parameters", "open_gates"):
        assert tested.results[key] == trained.results[key], key
    assert tested.results["compacted_test_acc"] == pytest.approx(tested.results["test_acc"])
    net = load_compacted(tested.results["compacted"])
    assert sum(p.numel() for p in net.parameters()) == tested.results["compacted_parameters"]


@pytest.mark.costly
def test_it_is_resumed_and_fine_tuned_from_a_plain_one(run, quick):
    plain = run("train", *quick, "without_using_gate=true")
    assert plain.code == 0, plain.err
    tuned = run("train", f"ckpt_path={plain.last}", "droprate_init=0.05", "trainer.max_epochs=1", *quick[6:8])
    assert tuned.code == 0, tuned.err
    assert "initialised anew at droprate_init=0.05" in tuned.err
    assert tuned.results["gates"] == 2880
    longer = run("train", f"ckpt_path={tuned.last}", "resume_training=true", "trainer.max_epochs=2")
    assert longer.code == 0, longer.err
    assert longer.results["epochs"] == 2
    other = run("train", f"ckpt_path={plain.last}", "model.name=resnet34")
    assert other.code == 2
    assert "is of model=resnet18, not of model=resnet34" in other.err


@pytest.mark.costly
@pytest.mark.parametrize("name", ["mobilenet_v2", "densenet121", "squeezenet1_1", "vgg11_bn"])
def test_others_take_gates_by_name(name):
    net = build({**SETTINGS, "name": name}, Form(7, (1, 32, 32)), gated=True, droprate_init=0.3)
    plain = build({**SETTINGS, "name": name}, Form(7, (1, 32, 32)), gated=False)
    assert net.eval()(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    gates = (".gates.log_alpha", ".gates._extra_state")
    assert {k for k in net.state_dict() if not k.endswith(gates)} == set(plain.state_dict())
    assert any(".gate." in k for k in net.state_dict())


def test_small_images_are_not_shrunk_by_the_stem():
    image = torch.randn(1, 3, 32, 32)
    for name, before, after in (("resnet18", 8, 32), ("densenet121", 8, 32), ("mobilenet_v2", 16, 32)):
        for small, size in ((False, before), (True, after)):
            net = torchvision_network(name, 10, (3, 32, 32), gated=False, small_images=small).eval()
            first = net.layer1 if name == "resnet18" else net.features[1 if name == "mobilenet_v2" else 4]
            seen = []
            first.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].shape[-1]))
            net(image)
            assert seen == [size], name
    with pytest.raises(InputError, match="stem of vgg11"):
        torchvision_network("vgg11", 10, (3, 32, 32), small_images=True)


@pytest.mark.costly
def test_wrong_input(run, quick, tmp_path):
    for arguments, message in (
        (["model.name=resnet81"], "did you mean 'resnet18'"),
        (["model.weights=nowhere.pth"], "model.weights=nowhere.pth: no such file"),
        (["model.weights=3"], "model.weights=3: no such file"),
        (["model.small_images=abc"], "model.small_images=abc: expected true or false"),
        (["model.residual=1"], "model.residual=1: expected true or false"),
        (["model.smal_images=true"], "did you mean 'model.small_images'"),
        (["model.name=inception_v3"], "model.name=inception_v3 cannot read images of shape (3, 8, 8)"),
    ):
        outcome = run("train", *quick, *arguments)
        assert outcome.code == 2, (arguments, outcome.err)
        assert message in outcome.err


def test_weights_of_other_classes_start_everything_but_the_output(tmp_path):
    torch.manual_seed(0)
    trained = torchvision_network("resnet18", 5, (3, 32, 32), gated=False)
    path = tmp_path / "resnet18.pth"
    torch.save(trained.state_dict(), path)
    net = torchvision_network("resnet18", 3, (3, 32, 32), droprate_init=0.05)
    output = net.fc.weight.clone()
    load_weights_file_(net, path)
    assert torch.equal(net.layer4[1].conv2.weight, trained.layer4[1].conv2.weight)
    assert torch.equal(net.fc.weight, output)
    with pytest.raises(InputError, match="does not fit the network"):
        load_weights_file_(torchvision_network("resnet34", 3, (3, 32, 32), gated=False), path)
    path.write_bytes(b"no weights")
    with pytest.raises(InputError, match="not a file of weights"):
        load_weights_file_(net, path)
