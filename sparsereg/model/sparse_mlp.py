"""A multi-layer perceptron for images with a gate on every weight.

Unstructured: it shows how few weights a task needs, and saves storage (``sparsereg.layers.storage``
measures how much), not time.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from sparsereg.checks import check_count
from sparsereg.distributions import TEMPERATURE, HardConcrete
from sparsereg.layers.linear import L0Linear
from sparsereg.model.lenet import check_task

GATE = ("weights", "none")


class SparseMLP(nn.Module):
    """Dense layers with ReLU between them and a gate on every weight.

    Args:
        num_classes: number of classes, >= 2.
        image_shape: (channels, height, width) of the images, which are flattened.
        gate: ``weights`` or ``none``.
        hidden_sizes: sizes of the hidden layers, each >= 1.
        droprate_init: initial dropout rate of the gates in (0, 1), as for
            ``sparsereg.model.basic_l0_blocks.L0Gate``.
        temperature: beta > 0.
        sampling: ``batch``; weight gates cannot be drawn for each example.
        stretch: the interval is (-stretch, 1 + stretch).
        jitter: standard deviation of the noise on the initial location.

    Raises:
        ValueError: an argument is outside its range.
    """

    def __init__(
        self,
        num_classes: int = 10,
        image_shape: Sequence[int] = (1, 28, 28),
        gate: str = "weights",
        hidden_sizes: Sequence[int] = (300, 100),
        droprate_init: float = 0.5,
        temperature: float = TEMPERATURE,
        sampling: str = "batch",
        stretch: float = 0.1,
        jitter: float = 0.01,
    ) -> None:
        super().__init__()
        shape = check_task(num_classes, image_shape, gate, GATE)
        if sampling != "batch":
            raise ValueError(f"sampling must be batch for gates on weights, got {sampling!r}")
        if not 0 < droprate_init < 1:
            raise ValueError(f"droprate_init must be a rate in (0, 1), got {droprate_init!r}")
        if isinstance(hidden_sizes, str) or not isinstance(hidden_sizes, Sequence):
            raise ValueError(f"hidden_sizes must be a list of integers >= 1, got {hidden_sizes!r}")
        for size in hidden_sizes:
            check_count("hidden_sizes", size)
        settings: dict[str, Any] = {
            "temperature": temperature,
            "stretch": stretch,
            "jitter": jitter,
            "log_alpha_init": math.log1p(-droprate_init) - math.log(droprate_init),
        }
        sizes = [math.prod(shape), *hidden_sizes, num_classes]
        layers: list[nn.Module] = [nn.Flatten()]
        for n_in, n_out in itertools.pairwise(sizes):
            layers += [_layer(n_in, n_out, settings if gate == "weights" else None), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Images (batch, channels, height, width) to logits (batch, num_classes)."""
        logits: Tensor = self.layers(x)
        return logits


def _layer(n_in: int, n_out: int, gates: dict[str, Any] | None) -> nn.Module:
    layer: nn.Linear | L0Linear
    if gates is None:
        layer = nn.Linear(n_in, n_out)
    else:
        layer = L0Linear(n_in, n_out)
        layer.weight_gates = HardConcrete(n_out, n_in, **gates)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return layer
