"""The small GoogleNet for 32 x 32 images, with gates behind its convolutions.

The network of the UvA deep learning tutorial 4 (inception blocks with BatchNorm, 128 features at the
end), 260,650 weights without gates for ten classes. Its 1,312 convolution channels are 832 outputs of
inception branches, 416 outputs of 1x1 reductions inside the branches, and 64 of the stem.

Source: Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, https://arxiv.org/abs/1409.4842;
https://lightning.ai/docs/pytorch/stable/notebooks/course_UvA-DL/04-inception-resnet-densenet.html
"""

import torch
from torch import Tensor, nn

from sparsereg.model.basic_l0_blocks import ConvBlock, GateFactory

GATE = ("branches", "all", "none")
ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
}

# Channels of the branches 1x1, 3x3, 5x5 and pool of each block; the reductions in front of 3x3 and 5x5.
BLOCKS: tuple[tuple[tuple[int, int, int, int], tuple[int, int]] | None, ...] = (
    ((16, 32, 8, 8), (32, 16)),
    ((24, 48, 12, 12), (32, 16)),
    None,  # max-pooling, 32 x 32 to 16 x 16
    ((24, 48, 12, 12), (32, 16)),
    ((16, 48, 16, 16), (32, 16)),
    ((16, 48, 16, 16), (32, 16)),
    ((32, 48, 24, 24), (32, 16)),
    None,  # max-pooling, 16 x 16 to 8 x 8
    ((32, 64, 16, 16), (48, 16)),
    ((32, 64, 16, 16), (48, 16)),
)
STEM = 64


class InceptionBlock(nn.Module):
    """Four branches side by side, concatenated: 1x1, 1x1 -> 3x3, 1x1 -> 5x5, max-pooling -> 1x1.

    Args:
        in_channels: channels in.
        branches: output channels of the four branches.
        reductions: channels of the 1x1 convolutions in front of the 3x3 and the 5x5.
        act: the activation's class.
        branch_gate: makes the gates behind the branches; None: no gates.
        inner_gate: makes the gates behind the reductions; None: no gates.
    """

    def __init__(
        self,
        in_channels: int,
        branches: tuple[int, int, int, int],
        reductions: tuple[int, int],
        act: type[nn.Module] = nn.ReLU,
        branch_gate: GateFactory | None = None,
        inner_gate: GateFactory | None = None,
    ) -> None:
        super().__init__()
        one, three, five, pooled = branches
        self.branch1x1 = ConvBlock(in_channels, one, 1, act, branch_gate)
        self.branch3x3 = nn.Sequential(
            ConvBlock(in_channels, reductions[0], 1, act, inner_gate),
            ConvBlock(reductions[0], three, 3, act, branch_gate),
        )
        self.branch5x5 = nn.Sequential(
            ConvBlock(in_channels, reductions[1], 1, act, inner_gate),
            ConvBlock(reductions[1], five, 5, act, branch_gate),
        )
        self.branch_pool = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1),
            ConvBlock(in_channels, pooled, 1, act, branch_gate),
        )
        self.out_channels = sum(branches)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, h, w) to (batch, sum of branches, h, w)."""
        return torch.cat(
            [self.branch1x1(x), self.branch3x3(x), self.branch5x5(x), self.branch_pool(x)], dim=1
        )


class GoogleNet(nn.Module):
    """The small GoogleNet. Logits of shape (batch, num_classes); gates by ``gate``.

    Args:
        num_classes: number of classes, >= 2.
        in_channels: channels of the images.
        gate: ``branches`` gates the four branches of every block (832 gates), ``all`` also the stem and
            the reductions (1,312), ``none`` none.
        act: activation, a key of ``ACTIVATIONS``.
        **gate_settings: keyword arguments of ``sparsereg.model.basic_l0_blocks.L0Gate``, such as
            ``droprate_init``, ``temperature`` and ``sampling``.

    Raises:
        ValueError: an argument is outside its range.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        gate: str = "branches",
        act: str = "relu",
        **gate_settings: object,
    ) -> None:
        super().__init__()
        if gate not in GATE:
            raise ValueError(f"gate must be one of {', '.join(GATE)}, got {gate!r}")
        if act not in ACTIVATIONS:
            raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
        if num_classes < 2 or in_channels < 1:
            raise ValueError(f"need num_classes >= 2 and in_channels >= 1, got {num_classes}, {in_channels}")
        factory = GateFactory(**gate_settings)
        branch = None if gate == "none" else factory
        inner = factory if gate == "all" else None
        cls = ACTIVATIONS[act]

        self.stem = ConvBlock(in_channels, STEM, 3, cls, inner)
        width = STEM
        blocks: list[nn.Module] = []
        for block in BLOCKS:
            if block is None:
                blocks.append(nn.MaxPool2d(3, stride=2, padding=1))
                continue
            blocks.append(InceptionBlock(width, *block, cls, branch, inner))
            width = sum(block[0])
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(width, num_classes)
        self._initialise(act)

    def _initialise(self, act: str) -> None:
        """Kaiming for ReLU-like activations, Xavier for tanh; BatchNorm at one and zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                if act == "tanh":
                    nn.init.xavier_normal_(module.weight)
                else:
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images (batch, in_channels, h, w), normalised, to logits (batch, num_classes)."""
        x = self.blocks(self.stem(x))
        logits: Tensor = self.classifier(self.pool(x).flatten(1))
        return logits
