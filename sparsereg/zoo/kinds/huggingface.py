"""``model=huggingface``."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from sparsereg.errors import InputError
from sparsereg.settings import setting
from sparsereg.zoo.network import Gateable

if TYPE_CHECKING:
    from torch import nn

    from sparsereg.data.form import Form


@dataclass(frozen=True)
class HuggingFaceModel(Gateable):
    """A network of Hugging Face's transformers; other keys change its configuration. Nothing is fetched."""

    OTHERS: ClassVar[str | None] = "arguments"
    PRETRAINED: ClassVar[bool] = True
    TASKS: ClassVar[tuple[str, ...]] = (
        *("classification", "segmentation", "language_model", "text_classification"),
    )

    source: str = setting("huggingface", "", choices=("huggingface",))
    name: str = setting(
        "", "its type, such as bert or llama; null or empty: that of model.config", empty=True
    )
    config: str | None = setting(
        None, "a config.json, for random weights; or a local folder with one, and perhaps with weights"
    )
    described: Mapping[str, Any] | None = setting(None, "what model.config held: a run notes it here")
    arguments: Mapping[str, Any] = setting(dict, "of its configuration, such as num_hidden_layers")


def build(
    form: "Form", gated: bool, gates: dict[str, Any], *, name: str, pretrained: bool, **settings: Any
) -> "nn.Module":
    """Build it."""
    from sparsereg.zoo.gated import check_answer
    from sparsereg.zoo.huggingface import huggingface_network

    config = settings["described"] or {"model_type": name}
    folder = settings["config"] if pretrained else None
    net = huggingface_network(form, config, settings["arguments"], folder)
    check_answer(net, form, f"model=huggingface (of type {config['model_type']})")
    return net


def resolved(settings: HuggingFaceModel) -> HuggingFaceModel:
    """Return the settings with what the file that they name holds.

    Raises:
        InputError: it is missing or wrong, or none is named where one is needed.
    """
    if settings.described is not None:
        return settings
    if settings.config is None:
        if not settings.name:
            raise InputError(
                "model=huggingface needs model.config=FILE.json, a local folder, or a type: model.name=bert"
            )
        return settings
    from sparsereg.zoo.huggingface import described

    found = described(settings.config)
    kind = found["model_type"]
    if settings.name not in ("", kind):
        raise InputError(
            f"model.config={settings.config} is of type {kind}, not of model.name={settings.name}"
        )
    return replace(settings, name=kind, described=found)


NETWORK = HuggingFaceModel
