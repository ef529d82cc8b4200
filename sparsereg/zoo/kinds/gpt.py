"""``model=gpt``."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sparsereg.settings import setting
from sparsereg.zoo.network import Transformer

if TYPE_CHECKING:
    from torch import nn

    from sparsereg.data.form import Form


@dataclass(frozen=True)
class GptModel(Transformer):
    """A small decoder of bytes or other tokens: a language model, or a classifier of texts."""

    TASKS: ClassVar[tuple[str, ...]] = ("language_model", "text_classification")
    DATA: ClassVar[tuple[str, ...]] = ("data=text",)

    name: str = setting("gpt", "", choices=("gpt",))
    positions: str = setting("rotary", "how places are told apart", choices=("rotary", "learned"))
    tied: bool = setting(True, "the output layer of a language model has the weights of the embedding")


def build(
    form: "Form", gated: bool, gates: dict[str, Any], *, positions: str, tied: bool, **sizes: Any
) -> "nn.Module":
    """Build it."""
    from sparsereg.model.gpt import GPT, TextClassifier
    from sparsereg.model.transformer import Shape

    assert form.vocabulary is not None  # its tasks are those of texts
    read = (form.vocabulary, form.image_shape[0], Shape(**sizes), positions)
    return GPT(*read, tied) if form.task == "language_model" else TextClassifier(form.num_classes, *read)


NETWORK = GptModel
