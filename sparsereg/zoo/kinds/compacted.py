"""``model=compacted``: what compact=true wrote."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sparsereg.errors import InputError
from sparsereg.settings import setting
from sparsereg.zoo.network import Network

if TYPE_CHECKING:
    from torch import nn

    from sparsereg.data.form import Form


@dataclass(frozen=True)
class CompactedModel(Network):
    """A network that was made smaller; its structure is in the file that ckpt_path names."""

    TASKS: ClassVar[tuple[str, ...]] = ()

    name: str = setting("compacted", "", choices=("compacted",))


def build(form: "Form", gated: bool, gates: dict[str, Any], **settings: Any) -> "nn.Module":
    """Build it."""
    raise InputError("model=compacted has its structure in its file: give ckpt_path=.../compacted.pt")


NETWORK = CompactedModel
