"""Networks of timm and Hugging Face: built for the data, without a network; wrong input is one line."""

import json

import pytest
import torch

from sparsereg.data.batches import call, tensor_of
from sparsereg.data.form import Form
from sparsereg.errors import InputError
from sparsereg.zoo.config import CONFIGS
from sparsereg.zoo.networks import build, resolved

TEXT = Form(256, (12,), "language_model", 256)
KINDS = dict.fromkeys(("input_ids", "attention_mask"), ("int64", (12,)))
CLASSES = Form(3, (12,), "text_classification", 256, KINDS)
IMAGES = Form(5, (1, 32, 32))
MASKS = Form(4, (3, 32, 32), "segmentation")
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def huggingface(form, **keys):
    settings = resolved(CONFIGS["huggingface"](**keys))
    return build(settings, form, gated=False, pretrained=True)


@pytest.mark.parametrize(
    ("form", "kind", "changes"),
    [
        (TEXT, "llama", SMALL),
        (TEXT, "gpt2", {"n_embd": 16, "n_layer": 1, "n_head": 2}),
        (TEXT, "bert", SMALL),  # which is told to be a decoder
        (CLASSES, "bert", SMALL),
        (CLASSES, "llama", SMALL),
        (IMAGES, "vit", {**SMALL, "patch_size": 8}),
        (
            MASKS,
            "segformer",
            {
                "hidden_sizes": [8, 8, 8, 8],
                "depths": [1] * 4,
                "num_attention_heads": [1] * 4,
                "decoder_hidden_size": 8,
            },
        ),
    ],
)
def test_networks_of_hugging_face_fit_the_data(form, kind, changes):
    pytest.importorskip("transformers")
    net = huggingface(form, name=kind, arguments=changes)
    inputs = form.example(2)
    answer = tensor_of(call(net.eval(), inputs))
    assert answer.shape[:2] == (2, form.answer_shape[0])
    loss = tensor_of(call(net.train(), inputs)).square().mean()
    loss.backward()
    assert net.config.vocab_size == 256 if form.vocabulary else net.config.num_channels == form.image_shape[0]


def test_a_configuration_and_a_folder_with_weights(tmp_path):
    pytest.importorskip("transformers")
    hub = pytest.importorskip("huggingface_hub")
    net = huggingface(TEXT, name="llama", arguments=SMALL)
    net.save_pretrained(tmp_path / "folder")
    again = huggingface(TEXT, config=str(tmp_path / "folder"))
    for (name, one), other in zip(net.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    file = tmp_path / "folder" / "config.json"
    held = json.loads(file.read_text()) | {"auto_map": {"AutoModel": "evil.py--Net"}}
    file.write_text(json.dumps(held))
    settings = resolved(CONFIGS["huggingface"](config=str(file), arguments={"num_hidden_layers": 2}))
    assert settings.name == "llama"
    assert "auto_map" not in settings.described
    file.unlink()  # what a run notes is enough
    assert len(build(settings, TEXT, gated=False).model.layers) == 2
    assert hub.constants.HF_HUB_OFFLINE


WRONG = [
    ({"config": "bert-base-uncased"}, "names on the Hugging Face hub are not looked up, nothing is fetched"),
    ({"config": "meta-llama/Llama-3"}, "no such file or folder"),
    ({"config": "empty"}, "a folder with config.json in it"),
    ({"config": "list.json"}, "expected a configuration of transformers, with a model_type"),
    ({"config": "broken.json"}, "cannot be read as JSON"),
    ({"config": "pull.json"}, "holds an interpolation"),
    ({"config": "llama.json", "name": "bert"}, "is of type llama, not of model.name=bert"),
    ({"name": "lama"}, "transformers has no type of that name: did you mean"),
    ({"name": "vit"}, "has no network of this type for task=language_model"),
    (
        {"name": "llama", "arguments": {**SMALL, "num_attention_heads": 3}},
        "model=huggingface (of type llama)",
    ),
    ({}, "a type: model.name=bert"),
]


@pytest.mark.parametrize(("given", "message"), WRONG)
def test_wrong_input_of_hugging_face(tmp_path, monkeypatch, given, message):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "pull.json").write_text('{"model_type": "llama", "x": "${oc.env:HOME}"}')
    (tmp_path / "llama.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError) as caught:
        huggingface(TEXT, **given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bidirectional_network_is_no_language_model():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = torch.nn.Embedding(256, 256)

        def forward(self, x):
            states = self.tokens(x)
            return states + states.mean(1, keepdim=True)

    from sparsereg.zoo.gated import check_answer

    with pytest.raises(InputError, match="has to be causal"):
        check_answer(Net(), TEXT, "model._target_=Net")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("resnet10t", {}), ("vit_tiny_patch16_224", {"depth": 1, "patch_size": 8}), ("convnext_atto", {})],
)
def test_networks_of_timm_fit_the_data(name, arguments):
    pytest.importorskip("timm")
    net = build(CONFIGS["timm"](name=name, arguments=arguments), IMAGES, gated=False)
    assert net.eval()(IMAGES.example(2)).shape == (2, 5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "resnet10x"}, "timm has no network of that name: did you mean"),
        ({"name": "hf-hub:timm/resnet18"}, "names on a hub are not looked up"),
        ({"name": "resnet10t", "arguments": {"pretrained": True}}, "nothing is fetched"),
        ({"name": "resnet10t", "arguments": {"widht": 3}}, "cannot be built for images of shape (1, 32, 32)"),
    ],
)
def test_wrong_input_of_timm(given, message):
    pytest.importorskip("timm")
    with pytest.raises(InputError) as caught:
        build(CONFIGS["timm"](**given), IMAGES, gated=False)
    assert message in str(caught.value)
