"""``model=lenet5``."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sparsereg.settings import RATE, setting
from sparsereg.zoo.network import DROPOUT, Network, sampling, with_rates

if TYPE_CHECKING:
    from torch import nn

    from sparsereg.data.form import Form


@dataclass(frozen=True)
class LeNet5Model(Network):
    """LeNet-5 as in Caffe: 20 and 50 filters, 500 units, gates on filters and on the dense layers' units."""

    OWN_GATES: ClassVar[bool] = True

    name: str = setting("lenet5", "", choices=("lenet5",))
    sampling: str = sampling()
    droprate_init: float | tuple[float, ...] | None = setting(
        None,
        "one rate for each group of gates (20 filters, 50 filters, units that enter the dense layers, 500"
        " units); null: the general droprate_init",
        RATE,
    )
    dropout: float | tuple[float, ...] = setting(
        0.0, "rate of dropped activations in training, for all or one for each of these groups", DROPOUT
    )


def build(form: "Form", gated: bool, gates: dict[str, Any], **settings: Any) -> "nn.Module":
    """Build it."""
    from sparsereg.model.lenet import LeNet5

    gate = "units" if gated else "none"
    return LeNet5(form.num_classes, form.image_shape, gate=gate, **with_rates(settings, gates))


NETWORK = LeNet5Model
