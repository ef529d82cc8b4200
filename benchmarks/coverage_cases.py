"""The networks of ``benchmarks.coverage``: each library's, with random weights and an example."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

SIZES = (64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 512, 1024)
"""Of square images: the smallest that a network takes is used."""
LARGE = 200_000_000
"""Parameters above which the weights of a network lie on disk."""


@dataclass(frozen=True)
class Case:
    """One network.

    Attributes:
        origin: the library whose it is.
        name: as its library names it.
        family: networks that one file of the library makes.
        make: gives the network and an example, as positional inputs and inputs by name.
    """

    origin: str
    name: str
    family: str
    make: Callable[[str], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]

    def build(self) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        """The network in float64 and eval mode, as it might be after training, and an example."""
        torch.manual_seed(0)
        network, args, kwargs = self.make(self.name)
        network = network.eval().requires_grad_(False)
        as_if_trained_(network)
        if sum(p.numel() for p in network.parameters()) > LARGE:
            on_disk_(network)
        return network.double(), _double(args), _double(kwargs)


def on_disk_(network: nn.Module) -> None:
    """Keep the weights, in float64, in files that are gone with the process: memory holds the rest."""
    with TemporaryDirectory() as folder:
        for number, parameter in enumerate(network.parameters()):
            file = str(Path(folder) / str(number))
            kept = torch.from_file(file, shared=True, size=parameter.numel(), dtype=torch.float64)
            parameter.data = kept.view(parameter.shape).copy_(parameter.data)


def _double(value: Any) -> Any:
    return torch.utils._pytree.tree_map_only(
        Tensor, lambda t: t.double() if t.is_floating_point() else t, value
    )


@torch.no_grad()
def as_if_trained_(network: nn.Module) -> None:
    """Give scales, biases and statistics values that training might give them.

    What starts as zero, or as 1e-6, as the last norm or the scale of a residual branch does, would hide
    what happens in the branch.
    """
    for module in network.modules():
        statistics = dict(module.named_buffers(recurse=False))
        if "running_mean" in statistics and "running_var" in statistics:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    for parameter in network.parameters():
        if not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        if parameter.dim() < 2 or parameter.numel() == max(parameter.shape):
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        elif float(parameter.flatten()[:1000].std()) < 1e-3:
            parameter.normal_(0, parameter[0].numel() ** -0.5)


def cases(library: str, names: Iterable[str] | None = None) -> list[Case]:
    """Networks of one library, in order of their names."""
    found = CASES[library]()
    return [case for case in found if names is None or case.name in names]


# ---- torchvision


def torchvision_cases() -> list[Case]:
    """Every network that classifies or segments."""
    from torchvision import models

    names = [*models.list_models(models), *models.list_models(models.segmentation)]
    found = [Case("torchvision", name, _torchvision_family(name), _torchvision) for name in names]
    return _by_turns(found)


def _by_turns(found: list[Case]) -> list[Case]:
    """One of each family, then the second of each, so that a run that is stopped has seen most kinds."""
    turns = Counter[str]()
    order = []
    for case in found:
        order.append(turns[case.family])
        turns[case.family] += 1
    return [case for _, case in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]


def _torchvision_family(name: str) -> str:
    from torchvision.models import get_model_builder

    return str(get_model_builder(name).__module__).rpartition(".")[2]


def _torchvision(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    from torchvision import models

    settings: dict[str, Any] = {"weights": None}
    size = {"inception_v3": 75, "maxvit_t": 224, "vit_h_14": 56}.get(name, 64)
    if name.startswith("vit_"):
        settings["image_size"] = size
    if name in ("inception_v3", "googlenet"):
        settings["init_weights"] = False
    if name in models.list_models(models.segmentation):
        settings["weights_backbone"] = None
    return models.get_model(name, **settings), (torch.randn(2, 3, size, size),), {}


# ---- timm

SMALL_FIRST = """
    zepto atto femto pico nano mini xxxs xxtiny xxsmall xxs xtiny xsmall xs extra_small ultra_small t0
    tiny small s0 m0 a0 b0 x0 e0 _s _t lite light mobile medium base _b _m large huge giant gigantic enormous
    _xl _g
""".split()  # noqa: SIM905
SEVERAL = {
    "byobnet": "repvgg_a0 mobileone_s0 gernet_s resnet51q",
    "byoanet": "botnet26t_256 halonet26t lambda_resnet26t",
    "efficientnet": "efficientnet_b0 efficientnet_lite0 mnasnet_100 mixnet_s mobilenetv2_100 tinynet_e",
    "resnet": "resnet18 resnet50d ecaresnet26t seresnet18 resnext50_32x4d",
    "mlp_mixer": "mixer_s32_224 gmlp_ti16_224 resmlp_12_224",
    "maxxvit": "coatnet_nano_rw_224 maxvit_rmlp_pico_rw_256",
    "metaformer": "poolformer_s12 poolformerv2_s12 convformer_s18 caformer_s18",
    "mobilenetv3": "mobilenetv3_small_100 mobilenetv4_conv_small fbnetc_100 lcnet_050",
    "mobilevit": "mobilevit_xxs mobilevitv2_050",
    "nfnet": "nfnet_f0 nf_resnet26",
    "regnet": "regnetx_002 regnety_002 regnetz_005",
    "twins": "twins_svt_small twins_pcpvt_small",
    "vision_transformer": "vit_tiny_patch16_224 vit_base_patch16_clip_224",
    "eva": "eva02_tiny_patch14_224",
    "resnetv2": "resnetv2_50",
    "vgg": "vgg11_bn",
    "hrnet": "hrnet_w18_small",
    "convnext": "convnext_atto convnextv2_atto",
    "senet": "legacy_seresnet18 legacy_seresnext26_32x4d",
    "cspnet": "cspresnet50 darknet53",
    "levit": "levit_128s levit_conv_128s",
    "vovnet": "vovnet39a ese_vovnet19b_dw",
    "dla": "dla34",
    "dpn": "dpn48b",
    "res2net": "res2net50_26w_4s",
    "densenet": "densenet121",
    "sknet": "skresnet18",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_ns_224",
    "tresnet": "tresnet_m",
    "deit": "deit_tiny_distilled_patch16_224 deit3_small_patch16_224",
    "vision_transformer_relpos": "vit_relpos_small_patch16_224",
    "ghostnet": "ghostnet_050 ghostnetv2_100",
    "xcit": "xcit_nano_12_p16_224",
    "volo": "volo_d1_224",
    "cait": "cait_xxs24_224",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "xception_aligned": "xception41",
    "efficientvit_mit": "efficientvit_b0",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_sam": "samvit_base_patch16",
    "gcvit": "gcvit_xxtiny",
    "hgnet": "hgnetv2_b0",
    "beit": "beit_base_patch16_224",
    "pit": "pit_ti_224 pit_ti_distilled_224",
    "coat": "coat_lite_tiny coat_tiny",
    "crossvit": "crossvit_tiny_240",
    "naflexvit": "naflexvit_base_patch16_gap",
    "fastvit": "fastvit_t8",
    "iformer": "iformer_t",
    "sequencer": "sequencer2d_s",
}
"""Variants of families that are made of several kinds, or whose smallest is not found by its name."""


SHALLOW = {"deepseek_vit_412m": {"depth": 3}, "gemma4_vit_167m": {"depth": 3}, "qwen3_vit_88m": {"depth": 3}}
"""Families whose smallest variant is large: fewer of its blocks, which are all alike."""


def timm_cases() -> list[Case]:
    """One or more small variants of each family."""
    import timm

    families: dict[str, list[str]] = {}
    for name in timm.list_models():
        module = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
        families.setdefault(module, []).append(name)
    return _by_turns(
        [
            Case("timm", name, family, _timm)
            for family, names in sorted(families.items())
            for name in (SEVERAL[family].split() if family in SEVERAL else [_smallest(names)])
        ]
    )


def _smallest(names: list[str]) -> str:
    def rank(name: str) -> tuple[int, int, str]:
        known = [i for i, word in enumerate(SMALL_FIRST) if re.search(word + r"(?![a-z])", name)]
        return (min(known, default=20), len(name), name)

    return min((n for n in names if not n.startswith("test_")), key=rank)


def _timm(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    import timm

    failure: Exception | None = None
    own = timm.models.get_pretrained_cfg(name)
    channels, *default = own.input_size if own else (3, 224, 224)
    for size in dict.fromkeys((*SIZES[:8], *default, *SIZES[8:])):
        for settings in ({"img_size": size}, {}):
            try:
                network = timm.create_model(name, **SHALLOW.get(name, {}), **settings).eval()
                example = torch.randn(2, channels, size, size)
                with torch.no_grad():
                    network(example[:1])
            except Exception as error:
                failure = failure or error
                continue
            return network, (example,), {}
    raise failure or ValueError(f"{name} takes no image")


# ---- Hugging Face

TEXT = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODER = {**TEXT, "intermediate_size": 48, "max_position_embeddings": 24}
DECODER = {**ENCODER, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**DECODER, "num_key_value_heads": 2}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
STAGES = {"depths": [1, 1], "num_stages": 2}
TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("AutoModelForSequenceClassification", ENCODER),
    "roberta": ("AutoModelForMaskedLM", ENCODER),
    "xlm-roberta": ("AutoModelForTokenClassification", ENCODER),
    "distilbert": (
        "AutoModelForSequenceClassification",
        {
            "vocab_size": 60,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 48,
            "max_position_embeddings": 24,
        },
    ),
    "albert": ("AutoModelForSequenceClassification", {**ENCODER, "embedding_size": 16}),
    "electra": ("AutoModelForSequenceClassification", {**ENCODER, "embedding_size": 16}),
    "deberta": (
        "AutoModelForSequenceClassification",
        {
            **ENCODER,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_biased_input": False,
        },
    ),
    "deberta-v2": (
        "AutoModelForSequenceClassification",
        {
            **ENCODER,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "share_att_key": True,
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
        },
    ),
    "mobilebert": (
        "AutoModelForSequenceClassification",
        {**ENCODER, "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    ),
    "mpnet": ("AutoModelForSequenceClassification", ENCODER),
    "modernbert": (
        "AutoModelForSequenceClassification",
        {
            **ENCODER,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
    ),
    "gpt2": (
        "AutoModelForCausalLM",
        {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24, "use_cache": False},
    ),
    "gpt_neo": (
        "AutoModelForCausalLM",
        {
            "vocab_size": 60,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            "max_position_embeddings": 24,
            "use_cache": False,
        },
    ),
    "gpt_neox": ("AutoModelForCausalLM", DECODER),
    "gptj": (
        "AutoModelForCausalLM",
        {
            "vocab_size": 60,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 24,
            "rotary_dim": 4,
            "use_cache": False,
        },
    ),
    "opt": ("AutoModelForCausalLM", {**DECODER, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": (
        "AutoModelForCausalLM",
        {"vocab_size": 60, "hidden_size": 32, "n_layer": 2, "n_head": 4, "use_cache": False},
    ),
    "falcon": ("AutoModelForCausalLM", DECODER),
    "llama": ("AutoModelForCausalLM", GROUPED),
    "mistral": ("AutoModelForCausalLM", {**GROUPED, "sliding_window": 4}),
    "mixtral": ("AutoModelForCausalLM", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("AutoModelForCausalLM", {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("AutoModelForCausalLM", {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("AutoModelForCausalLM", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("AutoModelForCausalLM", GROUPED),
    "qwen3": ("AutoModelForCausalLM", {**GROUPED, "head_dim": 8}),
    "gemma": ("AutoModelForCausalLM", {**GROUPED, "head_dim": 8}),
    "gemma2": ("AutoModelForCausalLM", {**GROUPED, "head_dim": 8, "sliding_window": 4}),
    "phi": ("AutoModelForCausalLM", DECODER),
    "phi3": ("AutoModelForCausalLM", GROUPED),
    "stablelm": ("AutoModelForCausalLM", GROUPED),
    "t5": (
        "AutoModelForSeq2SeqLM",
        {
            "vocab_size": 60,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "use_cache": False,
            "decoder_start_token_id": 0,
        },
    ),
    "bart": (
        "AutoModelForSeq2SeqLM",
        {
            "vocab_size": 60,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 24,
            "use_cache": False,
        },
    ),
    "whisper": (
        "AutoModelForSpeechSeq2Seq",
        {
            "vocab_size": 60,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_source_positions": 16,
            "max_target_positions": 16,
            "num_mel_bins": 8,
            "use_cache": False,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
    ),
    "wav2vec2": (
        "AutoModelForCTC",
        {
            **ENCODER,
            "conv_dim": [16, 16],
            "conv_kernel": [4, 4],
            "conv_stride": [4, 4],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
            "apply_spec_augment": False,
        },
    ),
    "vit": ("AutoModelForImageClassification", VISION),
    "deit": ("DeiTForImageClassification", VISION),
    "beit": ("AutoModelForImageClassification", VISION),
    "dinov2": ("AutoModelForImageClassification", {**VISION, "mlp_ratio": 2}),
    "swin": (
        "AutoModelForImageClassification",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
        },
    ),
    "swinv2": (
        "AutoModelForImageClassification",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
        },
    ),
    "convnext": ("AutoModelForImageClassification", {"hidden_sizes": [16, 24], **STAGES}),
    "convnextv2": ("AutoModelForImageClassification", {"hidden_sizes": [16, 24], **STAGES}),
    "resnet": (
        "AutoModelForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [16, 24], "depths": [1, 1]},
    ),
    "segformer": (
        "AutoModelForSemanticSegmentation",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [16, 24],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [2, 3],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 20,
        },
    ),
    "mobilevit": (
        "AutoModelForImageClassification",
        {"image_size": 64, "hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [16, 16, 24, 32, 40, 48, 56]},
    ),
}
"""Type of each model, what is made of it, and its configuration."""


def huggingface_cases() -> list[Case]:
    """Tiny configurations of model types, with random weights."""
    return [Case("huggingface", name, name.replace("-", "_"), _huggingface) for name in TYPES]


MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")
"""Types whose experts are computed in one call by default, which knows no float64."""


def _huggingface(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    import transformers

    head, settings = TYPES[name]
    config = transformers.AutoConfig.for_model(name, **settings)
    if name in MIXTURES:
        config._experts_implementation = "batched_mm"
    kind = getattr(transformers, head)
    network = kind.from_config(config) if head.startswith("Auto") else kind(config)
    ids = torch.randint(3, 60, (2, 10))
    if name == "whisper":
        return network, (), {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": ids}
    if name == "wav2vec2":
        return network, (), {"input_values": torch.randn(2, 256)}
    if "Image" in head or "Semantic" in head:
        size = 64 if name in ("resnet", "segformer", "mobilevit", "convnext", "convnextv2") else 32
        return network, (), {"pixel_values": torch.randn(2, 3, size, size)}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if head == "AutoModelForSeq2SeqLM":
        inputs["decoder_input_ids"] = torch.randint(3, 60, (2, 7))
    return network, (), inputs


CASES: dict[str, Callable[[], list[Case]]] = {
    "torchvision": torchvision_cases,
    "timm": timm_cases,
    "huggingface": huggingface_cases,
}
"""What makes the list of each library."""
