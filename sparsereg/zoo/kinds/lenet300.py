"""``model=lenet300``."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sparsereg.settings import RATE, setting
from sparsereg.target_settings import FAMILIES
from sparsereg.zoo.network import DROPOUT, Network, sampling, with_rates

if TYPE_CHECKING:
    from torch import nn

    from sparsereg.data.form import Form


@dataclass(frozen=True)
class LeNet300Model(Network):
    """LeNet-300-100: dense layers of 300 and 100 units, gates on the input pixels and on the hidden units."""

    OWN_GATES: ClassVar[bool] = True

    name: str = setting("lenet300", "", choices=("lenet300",))
    sampling: str = sampling()
    droprate_init: float | tuple[float, ...] | None = setting(
        None,
        "one rate for each group of gates (input pixels, 300 units, 100 units); null: the general"
        " droprate_init",
        RATE,
    )
    dropout: float | tuple[float, ...] = setting(
        0.0, "rate of dropped activations in training, for all or one for each of these groups", DROPOUT
    )

    @property
    def limits(self) -> dict[str, Any]:
        """The input pixels may go as well, as with its own gates."""
        return {"families": tuple(FAMILIES)}


def build(form: "Form", gated: bool, gates: dict[str, Any], **settings: Any) -> "nn.Module":
    """Build it."""
    from sparsereg.model.lenet import LeNet300

    gate = "units" if gated else "none"
    return LeNet300(form.num_classes, form.image_shape, gate=gate, **with_rates(settings, gates))


NETWORK = LeNet300Model
