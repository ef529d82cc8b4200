"""LeNet-300-100 and LeNet-5 (the Caffe variant) with gates on whole units, as in the paper.

Gates sit on the units that enter each dense layer (for LeNet-300-100 the input pixels too) and on the
filters of the convolutions: 784-300-100 and 20-50-800-500 gates for 28 x 28 images. A closed gate takes
a unit with all its weights away, so that what is left is a smaller dense network.

Source: Louizos, Welling, Kingma 2018, section 4.1 and table 1; Y. LeCun et al., "Gradient-based learning
applied to document recognition", 1998; the Caffe variant is BVLC/caffe, examples/mnist/lenet.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparsereg.checks import check_below_one
from sparsereg.model.basic_l0_blocks import GateFactory, L0Gate
from sparsereg.penalties import GatedTensor, gated_tensors

GATE = ("units", "none")
Init = float | Sequence[float]


class LeNet300(nn.Module):
    """Dense layers of 300 and 100 units; gates on the input pixels and on both hidden layers.

    Args:
        num_classes: number of classes, >= 2.
        image_shape: (channels, height, width) of the images, which are flattened.
        gate: ``units`` or ``none``.
        droprate_init: initial dropout rate of all gates, or one for each of the 3 groups (the paper's
            experiments start the inputs at 0.2 and the hidden units at 0.5).
        dropout: rate in [0, 1) at which single activations are dropped in training where the gates sit,
            for all or one for each of the 3 groups; 0 drops none. It stays in the compacted network.
        **gate_settings: other keyword arguments of ``sparsereg.model.basic_l0_blocks.L0Gate``.

    Raises:
        ValueError: an argument is outside its range.
    """

    def __init__(
        self,
        num_classes: int = 10,
        image_shape: Sequence[int] = (1, 28, 28),
        gate: str = "units",
        droprate_init: Init = 0.5,
        dropout: Init = 0.0,
        **gate_settings: object,
    ) -> None:
        super().__init__()
        channels, height, width = check_task(num_classes, image_shape, gate, GATE)
        inputs = channels * height * width
        gates = _gates(gate, (inputs, 300, 100), droprate_init, gate_settings)
        self.flatten = nn.Flatten()
        self.input_gate, self.hidden_gate1, self.hidden_gate2 = gates
        self.input_drop, self.hidden_drop1, self.hidden_drop2 = _dropouts(dropout, 3)
        self.fc1 = nn.Linear(inputs, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, num_classes)
        self.act1 = nn.ReLU()
        self.act2 = nn.ReLU()
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (batch, channels, height, width) to logits (batch, num_classes)."""
        x = self.input_drop(self.input_gate(self.flatten(x)))
        x = self.hidden_drop1(self.hidden_gate1(self.act1(self.fc1(x))))
        x = self.hidden_drop2(self.hidden_gate2(self.act2(self.fc2(x))))
        logits: Tensor = self.fc3(x)
        return logits


class LeNet5(nn.Module):
    """Two 5x5 convolutions of 20 and 50 filters, dense layers of 500 units; gates on all that can go.

    Gates: 20 and 50 on the filters, one on each unit that enters the first dense layer (800 for
    28 x 28 images) and 500 on its output. Images below 16 x 16 pixels are padded by 2 in front of each
    convolution, since two 5x5 convolutions and two poolings would leave nothing of them.

    A filter's gate stands behind max-pooling and ReLU instead of in front of them: the two let a
    factor >= 0 through, and there are fewer values to multiply.

    Args:
        num_classes: number of classes, >= 2.
        image_shape: (channels, height, width) of the images, at least 4 x 4 pixels.
        gate: ``units`` or ``none``.
        droprate_init: initial dropout rate of all gates, or one for each of the 4 groups.
        dropout: rate in [0, 1) at which single activations are dropped in training where the gates sit,
            for all or one for each of the 4 groups; 0 drops none. It stays in the compacted network.
        **gate_settings: other keyword arguments of ``sparsereg.model.basic_l0_blocks.L0Gate``.

    Raises:
        ValueError: an argument is outside its range.
    """

    def __init__(
        self,
        num_classes: int = 10,
        image_shape: Sequence[int] = (1, 28, 28),
        gate: str = "units",
        droprate_init: Init = 0.5,
        dropout: Init = 0.0,
        **gate_settings: object,
    ) -> None:
        super().__init__()
        channels, height, width = check_task(num_classes, image_shape, gate, GATE, smallest=4)
        padding = 0 if min(height, width) >= 16 else 2
        units = 50 * _conv_out(height, padding) * _conv_out(width, padding)
        gates = _gates(gate, (20, 50, units, 500), droprate_init, gate_settings)
        self.conv_gate1, self.conv_gate2, self.input_gate, self.hidden_gate = gates
        self.conv_drop1, self.conv_drop2, self.input_drop, self.hidden_drop = _dropouts(dropout, 4)
        self.conv1 = nn.Conv2d(channels, 20, 5, padding=padding)
        self.conv2 = nn.Conv2d(20, 50, 5, padding=padding)
        self.pool1 = nn.MaxPool2d(2)
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(units, 500)
        self.fc2 = nn.Linear(500, num_classes)
        self.act1 = nn.ReLU()
        self.act2 = nn.ReLU()
        self.act3 = nn.ReLU()
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (batch, channels, height, width) to logits (batch, num_classes)."""
        x = self.conv_drop1(self.conv_gate1(self.act1(self.pool1(self.conv1(x)))))
        x = self.conv_drop2(self.conv_gate2(self.act2(self.pool2(self.conv2(x)))))
        x = self.input_drop(self.input_gate(self.flatten(x)))
        x = self.hidden_drop(self.hidden_gate(self.act3(self.fc1(x))))
        logits: Tensor = self.fc2(x)
        return logits


@gated_tensors.register
def _(module: LeNet300) -> list[GatedTensor]:
    return [
        *_row(module.input_gate, module.fc1, "weight", 1),
        *_row(module.hidden_gate1, module.fc2, "weight", 1),
        *_row(module.hidden_gate2, module.fc3, "weight", 1),
    ]


@gated_tensors.register
def _(module: LeNet5) -> list[GatedTensor]:
    return [
        *_row(module.conv_gate1, module.conv1, "weight", 0),
        *_row(module.conv_gate1, module.conv1, "bias", 0),
        *_row(module.conv_gate2, module.conv2, "weight", 0),
        *_row(module.conv_gate2, module.conv2, "bias", 0),
        *_row(module.input_gate, module.fc1, "weight", 1),
        *_row(module.hidden_gate, module.fc2, "weight", 1),
    ]


def _row(gate: nn.Module, owner: nn.Module, name: str, dim: int) -> list[GatedTensor]:
    """One row for a gate, none for the nn.Identity in its place."""
    return [GatedTensor(gate.gates, owner, name, dim)] if isinstance(gate, L0Gate) else []


def check_task(
    num_classes: int, image_shape: Sequence[int], gate: str, choices: Sequence[str], smallest: int = 1
) -> tuple[int, int, int]:
    """Check the arguments that all these networks share and return the image shape.

    Raises:
        ValueError: an argument is outside its range.
    """
    if gate not in choices:
        raise ValueError(f"gate must be one of {', '.join(choices)}, got {gate!r}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be >= 2, got {num_classes!r}")
    shape = tuple(int(n) for n in image_shape)
    if len(shape) != 3 or shape[0] < 1 or min(shape[1:]) < smallest:
        raise ValueError(
            f"image_shape must be (channels, height, width) of at least {smallest} x {smallest} pixels, "
            f"got {tuple(image_shape)!r}"
        )
    return shape[0], shape[1], shape[2]


def _gates(
    gate: str, sizes: Sequence[int], droprate_init: Init, settings: dict[str, object]
) -> list[nn.Module]:
    if gate == "none":
        return [nn.Identity() for _ in sizes]
    rates = _for_each_group("droprate_init", droprate_init, len(sizes))
    return [
        GateFactory(droprate_init=rate, **settings)(size) for size, rate in zip(sizes, rates, strict=True)
    ]


def _dropouts(dropout: Init, groups: int) -> list[nn.Module]:
    rates = [check_below_one("dropout", rate) for rate in _for_each_group("dropout", dropout, groups)]
    return [nn.Dropout(rate) if rate else nn.Identity() for rate in rates]


def _for_each_group(name: str, rates: Init, groups: int) -> list[float]:
    each = list(rates) if isinstance(rates, Sequence) and not isinstance(rates, str) else [rates] * groups
    if len(each) != groups or not all(isinstance(rate, (int, float)) for rate in each):
        raise ValueError(f"{name} must be one rate or {groups}, one for each group of gates, got {rates!r}")
    return each


def _conv_out(size: int, padding: int) -> int:
    """Edge of the map after two (5x5 convolution, 2x2 pooling)."""
    for _ in range(2):
        size = (size + 2 * padding - 4) // 2
    return size


def _initialise(model: nn.Module) -> None:
    """Kaiming normal weights and zero biases."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            with torch.no_grad():
                assert module.bias is not None
                module.bias.zero_()
