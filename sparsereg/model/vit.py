"""A small vision transformer. Plain ``torch.nn`` without gates of its own.

Source: Dosovitskiy et al. 2021, "An image is worth 16x16 words"; the mean of all patches is classified, as in
Zhai et al. 2022, "Scaling vision transformers", and positions are learned.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparsereg.checks import check_count
from sparsereg.model.transformer import Block, Shape, initialise_


class ViT(nn.Module):
    """Patches of an image, as tokens of a transformer, to logits.

    Args:
        num_classes: number of classes, >= 2.
        image_shape: (channels, height, width) of the images.
        patch_size: height and width of a patch; height and width of the images are multiples of it.
        shape: of the transformer; None: 6 blocks of width 64.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> net = ViT(10, (1, 28, 28), 7, Shape(width=16, depth=1, heads=2))
        >>> net(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int = 10,
        image_shape: Sequence[int] = (3, 32, 32),
        patch_size: int = 4,
        shape: Shape | None = None,
    ) -> None:
        super().__init__()
        shape = shape or Shape(width=64, depth=6)
        if num_classes < 2:
            raise ValueError(f"num_classes must be >= 2, got {num_classes!r}")
        if len(image_shape) != 3:
            raise ValueError(f"image_shape must be (channels, height, width), got {tuple(image_shape)!r}")
        channels, height, width = image_shape
        size = check_count("patch_size", patch_size)
        if height % size or width % size:
            raise ValueError(
                f"images of {height} x {width} pixels are not made of patches of {size} x {size}: take "
                "another patch_size"
            )
        self.patches = nn.Conv2d(channels, shape.width, size, stride=size)
        self.places = nn.Parameter(torch.empty(1, (height // size) * (width // size), shape.width))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.norm = shape.make_norm()
        self.head = nn.Linear(shape.width, num_classes)
        initialise_(self, shape.depth)
        nn.init.normal_(self.places, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (batch, channels, height, width) to logits (batch, num_classes)."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits
