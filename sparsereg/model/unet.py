"""A small U-Net: a class for each pixel. Plain ``torch.nn`` without gates of its own.

Source: Ronneberger, Fischer, Brox 2015, "U-Net: convolutional networks for biomedical image segmentation";
padded convolutions, BatchNorm, and enlargement by repeated pixels.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsereg.checks import check_count


class UNet(nn.Module):
    """Images to logits of the same height and width.

    Args:
        num_classes: number of classes, >= 2.
        in_channels: channels of the images, >= 1.
        width: channels of the first level, >= 1; each further level has twice as many.
        depth: how often height and width are halved, >= 1.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> UNet(3, 1, width=4, depth=2)(torch.zeros(2, 1, 30, 21)).shape
        torch.Size([2, 3, 30, 21])
    """

    def __init__(self, num_classes: int, in_channels: int = 3, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be >= 2, got {num_classes!r}")
        check_count("width", width)
        widths = [width * 2**level for level in range(check_count("depth", depth, 12) + 1)]
        inputs = [check_count("in_channels", in_channels), *widths[:-1]]
        self.down = nn.ModuleList(_twice(n_in, n_out) for n_in, n_out in zip(inputs, widths, strict=True))
        self.up = nn.ModuleList(_twice(3 * n_out, n_out) for n_out in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (batch, channels, height, width) to logits (batch, num_classes, height, width)."""
        levels = [self.down[0](x)]
        for block in list(self.down)[1:]:
            levels.append(block(F.max_pool2d(levels[-1], 2)))
        x = levels.pop()
        for block in self.up:
            beside = levels.pop()
            x = block(torch.cat([F.interpolate(x, size=beside.shape[2:]), beside], 1))
        return cast(Tensor, self.head(x))


def _twice(n_in: int, n_out: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with BatchNorm and ReLU."""
    layers: list[nn.Module] = []
    for channels in (n_in, n_out):
        convolution = nn.Conv2d(channels, n_out, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
