"""A smaller network in the class of its author, with the arguments that give its shape."""

from functools import partial

import pytest
import torch
import torchvision
from torch import nn

from sparsereg.compression import compact, count, gate, holdable, restore_class
from sparsereg.compression.recipe import shapes_of
from sparsereg.compression.restore import Restorer, recipe_of
from sparsereg.compression.running import tensors_in
from sparsereg.compression.verify import difference
from sparsereg.errors import InputError
from sparsereg.penalties import hard_concretes

IDS = torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def shut_(network, part, places):
    """Shut the same places in all gates that have a part in their name."""
    for name, gates in hard_concretes(network).items():
        gates.log_alpha.fill_(10.0)
        if part in name:
            gates.log_alpha[places] = -10.0


def same(a, b, example):
    with torch.no_grad():
        one, two = (
            tensors_in(f(example) if not isinstance(example, dict) else f(**example))[0] for f in (a, b)
        )
    return difference(one, two)


def vision_transformer():
    torch.manual_seed(0)
    return torchvision.models.VisionTransformer(16, 4, 2, 3, 24, 40, num_classes=5).eval()


@pytest.mark.costly
def test_a_decoder_that_hands_out_keys_and_values_needs_no_other_configuration():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    network = transformers.LlamaForCausalLM(config).eval()
    example = {"input_ids": torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(0))}
    gated = gate(network, example)
    small = compact(gated, example)
    assert gated.config.use_cache
    given = gated(**example)
    assert given.past_key_values is not None
    torch.testing.assert_close(small(**example)["logits"], given.logits, rtol=1e-4, atol=1e-5)
    assert list(small(**example)) == ["logits"]


@pytest.mark.costly
def test_hidden_units_of_torchvision():
    original = vision_transformer()
    nn.init.normal_(original.heads.head.weight)
    gated = gate(original, IMAGES, families="units", jitter=0.0)
    shut_(gated, "mlp", slice(0, 15))
    restored = restore_class(gated, original, IMAGES)
    assert type(restored) is torchvision.models.VisionTransformer
    assert restored.mlp_dim == 25
    assert same(gated, restored, IMAGES) < 1e-5
    assert same(gated, restore_class(compact(gated, IMAGES), original, IMAGES), IMAGES) < 1e-5


@pytest.mark.costly
def test_a_ragged_shape_is_refused_with_the_layers_that_differ():
    original = vision_transformer()
    nn.init.normal_(original.heads.head.weight)
    gated = gate(original, IMAGES, families="units", jitter=0.0)
    shut_(gated, "layer_1.mlp", slice(0, 15))
    with pytest.raises(InputError, match=r"has one mlp_dim .*25 for .*layer_1.*40 for .*layer_0"):
        restore_class(gated, original, IMAGES)
    gated = gate(original, IMAGES, families="blocks", jitter=0.0)
    shut_(gated, "layer_1.mlp", slice(0, 1))
    with pytest.raises(InputError, match=r"cannot be without encoder.layers.encoder_layer_1"):
        restore_class(gated, original, IMAGES)


class Plain(nn.Module):
    """A class of a user's own, which keeps one of its arguments."""

    def __init__(self, features, widths=(6, 8), hidden=4):
        super().__init__()
        self.features = features
        self.a, self.b = nn.Linear(features, widths[0]), nn.Linear(widths[0], widths[1])
        self.c, self.d = nn.Linear(widths[1], hidden), nn.Linear(hidden, 2)

    def forward(self, x):
        return self.d(self.c(self.b(self.a(x).relu()).relu()).relu())


def test_arguments_that_are_lists():
    torch.manual_seed(0)
    original, x = Plain(5).eval(), torch.randn(3, 5)
    gated = gate(original, x, jitter=0.0)
    with torch.no_grad():
        for gates, left in zip(hard_concretes(gated).values(), (5, 3, 2), strict=True):
            gates.log_alpha.fill_(10.0)
            gates.log_alpha[left:] = -10.0
    restored = restore_class(gated, original, x)
    assert [m.out_features for m in restored.children()] == [5, 3, 2, 2]
    assert same(gated, restored, x) < 1e-6


def test_arguments_that_nobody_keeps_are_found_from_the_shapes():
    torch.manual_seed(0)
    original, x = Plain(5, (7, 9), 3).eval(), torch.randn(3, 5)
    gated = gate(original, x, jitter=0.0)
    shut_(gated, "b.gate", slice(0, 4))
    restored = restore_class(gated, original, x)
    assert [m.out_features for m in restored.children()] == [7, 5, 3, 2]
    assert same(gated, restored, x) < 1e-6


class Around(nn.Module):
    """A class that takes a part of itself as an argument."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def test_arguments_that_nobody_knows_are_asked_for():
    original, x = Around(Plain(5)).eval(), torch.randn(3, 5)
    gated = gate(original, x)
    with pytest.raises(
        InputError, match="the arguments that Around was made with are not known: give build="
    ):
        restore_class(gated, original, x)
    with pytest.raises(ValueError, match="must have gates, or be what compact"):
        restore_class(original, original, x)


STOCK = """
    resnet50 resnext50_32x4d vgg11_bn mobilenet_v2 mobilenet_v3_small densenet121 efficientnet_b0 vit_b_16
    efficientnet_v2_s convnext_tiny swin_t regnet_y_400mf squeezenet1_0 shufflenet_v2_x0_5 mnasnet0_5
""".split()  # noqa: SIM905


@pytest.mark.costly
@pytest.mark.parametrize("name", STOCK)
def test_how_a_network_of_torchvision_was_made_is_known(name):
    original = torchvision.models.get_model(name, weights=None, num_classes=7)
    recipe = recipe_of(original, None)
    assert recipe.shapes({}) == shapes_of(original)
    assert recipe.make is type(original)


def bottlenecks():
    block = torchvision.models.resnet.Bottleneck
    return torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=3)


def convnext():
    setting = torchvision.models.convnext.CNBlockConfig
    stages = [setting(8, 16, 1), setting(16, 24, 1), setting(24, None, 1)]
    return torchvision.models.ConvNeXt(stages, num_classes=3)


def inverted():
    row = partial(torchvision.models.mobilenetv3.InvertedResidualConfig, width_mult=1.0, dilation=1, kernel=3)
    rows = [row(16, expanded_channels=32, out_channels=24, use_se=False, activation="RE", stride=2)]
    rows += [row(24, expanded_channels=48, out_channels=24, use_se=False, activation="HS", stride=1)]
    return torchvision.models.MobileNetV3(rows, last_channel=40, num_classes=3)


def dense():
    return torchvision.models.DenseNet(8, (2, 2), 16, 2, num_classes=3)


def by_rounded_widths():
    settings = [[1, 16, 1, 1], [2, 24, 2, 2]]
    return torchvision.models.MobileNetV2(num_classes=3, inverted_residual_setting=settings)


CONVOLUTIONS = {
    "ResNet": (bottlenecks, ["channels"], ["layer*.conv[12]"]),
    "ConvNeXt": (convnext, ["width", "units"], None),
    "MobileNetV3": (inverted, ["channels", "units"], None),
    "DenseNet": (dense, ["channels"], None),
    "MobileNetV2": (by_rounded_widths, ["channels"], ["features.1.conv.1", "features.[23].conv.2"]),
}


@torch.no_grad()
def shut_a_quarter_(network):
    for gates in hard_concretes(network).values():
        places = torch.arange(gates.log_alpha.numel())
        gates.log_alpha.copy_(torch.where((places % 4 == 1) & (len(places) >= 4), -10.0, 10.0))


@pytest.mark.costly
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_networks_of_convolutions_by_settings_in_their_arguments(name):
    build, families, layers = CONVOLUTIONS[name]
    torch.manual_seed(0)
    original, x = build().eval(), torch.randn(2, 3, 32, 32)
    gated = gate(original, x, layers, families=families, shape="uniform", jitter=0.0)
    shut_a_quarter_(gated)
    restored = restore_class(gated, original, x, build=build)
    assert type(restored) is type(original)
    assert same(gated, restored, x) < 1e-5
    left = sum(p.numel() for p in restored.parameters())
    assert left == count(gated, x).compacted_parameters < sum(p.numel() for p in original.parameters())


@pytest.mark.costly
def test_layers_that_are_gone_as_a_whole():
    original, example = llama(num_hidden_layers=3), {"input_ids": IDS}
    gated = gate(original, example, families="blocks", jitter=0.0)
    shut_(gated, "layers.1.", slice(0, 1))
    restored = restore_class(gated, original, example)
    assert restored.config.num_hidden_layers == 2
    assert same(gated, restored, example) < 1e-5


def llama(num_hidden_layers=2):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=num_hidden_layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(config).eval()


HUGGINGFACE = {
    "llama units": (llama, "units", "mlp", slice(0, 20), {"intermediate_size": 28}),
    "llama groups": (llama, "kv_groups", "kv_groups", slice(0, 1), {"num_key_value_heads": 1}),
    "llama width": (llama, "width", "gate", slice(3, 7), {"hidden_size": 28}),
    "bert units": (bert, "units", "intermediate", slice(1, 7), {"intermediate_size": 30}),
}


@pytest.mark.costly
@pytest.mark.parametrize("case", HUGGINGFACE)
def test_models_of_transformers_know_their_new_configuration(case, tmp_path):
    build, family, part, places, expected = HUGGINGFACE[case]
    original = build()
    example = {"input_ids": IDS}
    gated = gate(original, example, families=family, jitter=0.0)
    shut_(gated, part, places)
    restored = restore_class(gated, original, example)
    for key, value in expected.items():
        assert getattr(restored.config, key) == value
    assert same(gated, restored, example) < 1e-5
    restored.save_pretrained(tmp_path)
    again = type(original).from_pretrained(tmp_path).eval()
    assert same(gated, again, example) < 1e-5
    assert sum(p.numel() for p in again.parameters()) <= sum(p.numel() for p in original.parameters())


@pytest.mark.costly
def test_networks_of_timm():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    original = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=4).eval()
    x = torch.randn(2, 3, 32, 32)
    gated = gate(original, x, families="units", jitter=0.0)
    shut_(gated, "mlp", slice(0, 384))
    restored = restore_class(gated, original, x)
    assert restored.blocks[0].mlp.fc1.out_features == 384
    assert same(gated, restored, x) < 1e-5


@torch.no_grad()
def shut_some_(network, sizes):
    """Of each tensor of gates, the first ones, as many as its size says."""
    for gates in hard_concretes(network).values():
        gates.log_alpha.fill_(10.0)
        gates.log_alpha[: sizes[gates.log_alpha.numel()]] = -10.0


@pytest.mark.costly
def test_smaller_heads_keep_the_scale_of_the_original_ones():
    original = bert()
    example = {"input_ids": IDS}
    gated = gate(original, example, families=["head_dims", "width"], jitter=0.0)
    shut_some_(gated, {6: 1, 24: 4})
    restored = restore_class(gated, original, example)
    assert restored.config.hidden_size == 20
    assert restored.bert.encoder.layer[0].attention.self.attention_head_size == 5
    assert same(gated, restored, example) < 1e-5


@pytest.mark.costly
def test_frequencies_of_rotary_positions_are_those_of_the_class():
    """With some pairs gone the frequencies are no longer what the class makes of the size of a head."""
    original = llama()
    example = {"input_ids": IDS}
    gated = gate(original, example, families="head_dims", jitter=0.0)
    shut_some_(gated, {4: 1, 8: 2})
    with pytest.raises(InputError, match="LlamaForCausalLM has the shape but gives other answers"):
        restore_class(gated, original, example)


@pytest.mark.costly
@pytest.mark.parametrize("build", [llama, bert])
def test_a_uniform_shape_always_comes_back(build):
    original, example = build(), {"input_ids": IDS}
    families = ["units", "width", "heads", "kv_groups"] if build is llama else "units"
    gated = gate(original, example, families=families, shape="uniform", jitter=0.0)
    free = gate(original, example, families=families)
    assert len(hard_concretes(gated)) < len(hard_concretes(free))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for gates in hard_concretes(gated).values():
            order = torch.randperm(gates.log_alpha.numel(), generator=generator)
            gates.log_alpha.copy_(torch.where(order % 4 > 0, 0.5 + torch.rand(len(order)), -10.0))
            gates.log_alpha[:] = gates.log_alpha if len(order) > 4 else 10.0
    restored = restore_class(gated, original, example)
    assert same(gated, restored, example) < 1e-5
    assert count(gated, example).compacted_parameters == sum(p.numel() for p in restored.parameters())


def test_one_shape_for_all_layers_leaves_no_layer_without_a_part():
    original, example = llama(), {"input_ids": IDS}
    free, uniform = (gate(original, example, shape=shape) for shape in ("free", "uniform"))
    assert any(g.log_alpha.numel() == 1 for g in hard_concretes(free).values())
    assert not any(g.log_alpha.numel() == 1 for g in hard_concretes(uniform).values())
    asked = gate(original, example, families=["blocks", "units"], shape="uniform")
    assert any(g.log_alpha.numel() == 1 for g in hard_concretes(asked).values())


SIZES = {"vocab_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = {**SIZES, "hidden_size": 24, "intermediate_size": 36}
GROUPS = {**SIZES, "hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2, "use_cache": False}
TYPES = {
    "GPT2LMHeadModel": (
        {"vocab_size": 40, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 4, "use_cache": False},
        ["units"],
    ),
    "DistilBertForMaskedLM": (
        {"vocab_size": 40, "dim": 24, "hidden_dim": 36, "n_layers": 2, "n_heads": 4},
        ["units"],
    ),
    "RobertaForMaskedLM": ({**SMALL, "max_position_embeddings": 16}, ["units"]),
    "MistralForCausalLM": (GROUPS, ["units", "width", "kv_groups"]),
    "Qwen2ForCausalLM": (GROUPS, ["units", "width", "kv_groups"]),
    "T5ForConditionalGeneration": (
        {"vocab_size": 40, "d_model": 24, "d_kv": 6, "d_ff": 36, "num_layers": 2, "num_heads": 4}
        | {"use_cache": False},
        ["units", "heads"],
    ),
    "ModernBertForMaskedLM": (
        {
            **SMALL,
            "pad_token_id": 0,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        ["units"],
    ),
    "ViTForImageClassification": ({**SMALL, "image_size": 16, "patch_size": 4, "num_labels": 3}, ["units"]),
    "GemmaForCausalLM": ({**GROUPS, "head_dim": 8}, ["units"]),
    "NemotronForCausalLM": ({**GROUPS, "head_dim": 8}, ["units", "width"]),
    "Qwen3ForCausalLM": ({**GROUPS, "head_dim": 8}, ["units", "width"]),
    "ResNetForImageClassification": (
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 3},
        ["channels"],
    ),
    "ConvNextForImageClassification": (
        {"hidden_sizes": [16, 24], "depths": [1, 1], "num_stages": 2, "num_labels": 3},
        ["units", "width"],
    ),
}


@pytest.mark.costly
@pytest.mark.parametrize("name", TYPES)
def test_types_of_transformers_in_one_shape_go_through_their_files(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    settings, families = TYPES[name]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    original = cls(cls.config_class(**settings)).eval()
    example = {"input_ids": IDS}
    if name.startswith("T5"):
        example["decoder_input_ids"] = IDS
    if "Image" in name:
        example = {"pixel_values": IMAGES}
    gated = gate(original, example, families=families, shape="uniform", jitter=0.0)
    with torch.no_grad():
        for gates in hard_concretes(gated).values():
            places = torch.arange(gates.log_alpha.numel())
            shut = places % 4 == 1 if len(places) > 4 else places == 0
            gates.log_alpha.copy_(torch.where(shut, -10.0, 10.0))
    restored = restore_class(gated, original, example)
    restored.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path).eval()
    assert same(gated, again, example) < 1e-5
    assert sum(p.numel() for p in again.parameters()) == count(gated, example).compacted_parameters


class Tied(nn.Module):
    """One argument for two sizes, and one for a third."""

    def __init__(self, hidden=12, last=9):
        super().__init__()
        self.hidden, self.last = hidden, last
        self.one, self.two = nn.Linear(4, hidden), nn.Linear(hidden, hidden)
        self.three, self.head = nn.Linear(hidden, last), nn.Linear(last, 2)

    def forward(self, x):
        return self.head(self.three(self.two(self.one(x).relu()).relu()).relu())


class Alike(nn.Module):
    """One argument for all there is."""

    def __init__(self, hidden=6):
        super().__init__()
        self.hidden = hidden
        self.one, self.two, self.head = nn.Linear(4, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 2)

    def forward(self, x):
        return self.head(self.two(self.one(x).relu()).relu())


class Forgetful(Tied):
    """Nobody knows what it was made with."""

    def __init__(self, hidden, last):
        super().__init__(hidden, last)
        del self.hidden, self.last
        self.extra = nn.Parameter(torch.ones(hidden % 5))


class Once(Alike):
    """An object that cannot be had again: only what has no memory can be made."""

    made = False

    def __init__(self, hidden=6):
        super().__init__(hidden)
        if self.one.weight.device.type != "meta":
            if Once.made:
                raise RuntimeError("one is enough")
            Once.made = True


def test_a_class_that_cannot_be_made_again_gets_all_gates_and_is_refused_later(caplog):
    network, x = Once().eval(), torch.randn(5, 4)
    gated = gate(network, x, shape="uniform")
    assert len(hard_concretes(gated)) == 2
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    with pytest.raises(InputError, match="Once cannot be made with its own arguments: one is enough"):
        restore_class(gated, network, x)


def gate_sizes(network):
    return sorted({g.gate_size[0] for g in hard_concretes(network).values()})


def test_gates_that_the_class_cannot_hold_are_left_out_before_training(caplog):
    torch.manual_seed(0)
    x, before = torch.randn(5, 4), torch.get_rng_state()
    network = Tied().eval()
    torch.set_rng_state(before)
    gated = gate(network, x, shape="uniform", jitter=0.0)
    assert torch.equal(torch.get_rng_state(), before)
    assert gate_sizes(gated) == [9]
    (said,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "Tied cannot hold what 2 of 3 gates would leave, which get none" in said
    assert "units of one.weight: Tied has one hidden" in said
    shut_(gated, "three", slice(0, 4))
    restored = restore_class(gated, Tied(), x)
    assert type(restored) is Tied
    assert restored.three.out_features == 5
    assert same(gated, restored, x) < 1e-5


def test_of_very_large_networks_the_shapes_are_tried(monkeypatch):
    monkeypatch.setattr(holdable, "ANSWERING", 1)
    monkeypatch.setattr(Restorer, "made", None)
    assert gate_sizes(gate(Tied().eval(), torch.randn(5, 4), shape="uniform")) == [9]


def test_gates_that_are_asked_for_are_put_in_with_a_warning(caplog):
    x = torch.randn(5, 4)
    gated = gate(Tied().eval(), x, families="units", shape="uniform")
    assert gate_sizes(gated) == [9, 12]
    assert "cannot hold what 2 of 3 gates would leave; restore_class will refuse it" in caplog.text


def test_a_class_that_can_hold_nothing_gets_all_gates_with_a_warning(caplog):
    gated = gate(Alike().eval(), torch.randn(5, 4), shape="uniform")
    assert len(hard_concretes(gated)) == 2
    assert "Alike cannot hold what 2 of 2 gates would leave; restore_class will refuse it" in caplog.text


class Narrow(Alike):
    """Likewise, and all passes through one number."""

    def __init__(self, hidden=6):
        super().__init__(hidden)
        self.in_, self.out = nn.Linear(hidden, 1), nn.Linear(1, hidden)

    def forward(self, x):
        return self.head(self.out(self.in_(self.two(self.one(x).relu()).relu()).relu()).relu())


def test_a_gate_of_one_place_holds_nothing_since_it_stays(caplog):
    gated = gate(Narrow().eval(), torch.randn(5, 4), shape="uniform")
    assert gate_sizes(gated) == [1, 6]
    assert "Narrow cannot hold what 3 of 4 gates would leave; restore_class will refuse it" in caplog.text


def test_of_a_class_with_arguments_that_nobody_knows_nothing_is_said(caplog):
    gated = gate(Forgetful(12, 9).eval(), torch.randn(5, 4), shape="uniform")
    assert gate_sizes(gated) == [9, 12]
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_what_no_configuration_of_transformers_holds_gets_no_gates():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=40, **sizes)).eval()
    gated = gate(bert, IDS, shape="uniform", jitter=0.0)
    assert list(hard_concretes(gated)) == ["encoder.layer.0.intermediate.dense.gate.gates"]
    groups = {**sizes, "num_key_value_heads": 2, "vocab_size": 40}
    mistral = transformers.MistralForCausalLM(transformers.MistralConfig(**groups)).eval()
    gated = gate(mistral, {"input_ids": IDS}, shape="uniform", jitter=0.0)
    names = set(hard_concretes(gated))
    assert any("kv_groups" in name for name in names)
    assert not any("heads" in name or "head_dims" in name for name in names)
    gated = gate(mistral, {"input_ids": IDS}, families="heads", shape="uniform", jitter=0.0)
    shut_(gated, "heads", slice(0, 1))
    with pytest.raises(InputError, match="num_attention_heads=3 has the shape but does not run"):
        restore_class(gated, mistral, {"input_ids": IDS})


def test_shapes_are_known():
    with pytest.raises(ValueError, match="shape: unknown 'even'; known are free, uniform"):
        gate(Plain(5).eval(), torch.randn(2, 5), shape="even")


@pytest.mark.costly
def test_what_a_class_refuses_is_said():
    original, example = llama(), {"input_ids": IDS}
    gated = gate(original, example, families="width")
    shut_(gated, "gate", slice(0, 10))
    with pytest.raises(InputError, match="LlamaForCausalLM refuses hidden_size=22"):
        restore_class(gated, original, example)
