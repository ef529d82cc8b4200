"""A network that sparsereg does not know: residual, depthwise, with squeeze-and-excitation."""

import torch
from torch import Tensor, nn


class Excite(nn.Module):
    """Scales the channels by what is seen of all of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.less, self.more = nn.Linear(width, width // 4), nn.Linear(width // 4, width)

    def forward(self, x: Tensor) -> Tensor:
        """Images (batch, width, height, width) to the same."""
        seen = torch.relu(self.less(x.mean((2, 3))))
        return x * torch.sigmoid(self.more(seen))[:, :, None, None]


class Block(nn.Module):
    """Depthwise, wider, excited, narrow again, added to what came in."""

    def __init__(self, width: int, wider: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.widen, self.narrow = nn.Conv2d(width, wider, 1), nn.Conv2d(wider, width, 1)
        self.excite = Excite(wider)

    def forward(self, x: Tensor) -> Tensor:
        """Images (batch, width, height, width) to the same."""
        inner = nn.functional.silu(self.widen(self.norm(self.depthwise(x))))
        return x + self.narrow(self.excite(inner))


class Their(nn.Module):
    """A stem, blocks and a head."""

    def __init__(self, in_channels: int, num_classes: int, width: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_channels, width, 3, 2, 1), nn.BatchNorm2d(width), nn.SiLU())
        self.blocks = nn.Sequential(*(Block(width, 2 * width) for _ in range(depth)))
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, in_channels, height, width) to logits (batch, num_classes)."""
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))
