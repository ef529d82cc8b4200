"""Networks of today in small, written as their authors write them, each with an example."""

import math

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn


class Attention(nn.Module):
    """Heads by one fused layer and a fused kernel, or by three layers and two matrix products."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.size, self.fused = heads, width // heads, fused
        if fused:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        if self.fused:
            q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            q, k, v = (
                f(x).view(b, n, self.heads, self.size).transpose(1, 2) for f in (self.q, self.k, self.v)
            )
            mask = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
            scores = (q @ k.transpose(-2, -1) / math.sqrt(self.size)).masked_fill(~mask, -1e9)
            y = scores.softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, n, self.heads * self.size))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, fused)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 24))
        self.positions = nn.Parameter(torch.randn(1, 17, 24))
        self.blocks = nn.Sequential(Block(24, 3, True), Block(24, 3, False))
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, two = x.chunk(2, -1)
    return x * cos + torch.cat([-two, one], -1) * sin


class Decoder(nn.Module):
    """Grouped queries, rotary positions, gated units, hand-written norms, tied embeddings, as in Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 32)
        self.norm1, self.norm2, self.norm3 = RMSNorm(32), RMSNorm(32), RMSNorm(32)
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)
        self.o = nn.Linear(32, 32, bias=False)
        self.gate, self.up = nn.Linear(32, 40, bias=False), nn.Linear(32, 40, bias=False)
        self.down = nn.Linear(40, 32, bias=False)
        self.register_buffer("frequencies", 1.0 / 100 ** (torch.arange(4) / 4))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        b, n, _ = x.shape
        angle = torch.arange(n, device=ids.device)[:, None] * self.frequencies[None]
        cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))
        h = self.norm1(x)
        q = rotate(self.q(h).view(b, n, 4, 8).transpose(1, 2), cos, sin)
        k = rotate(self.k(h).view(b, n, 2, 8).transpose(1, 2), cos, sin)
        v = self.v(h).view(b, n, 2, 8).transpose(1, 2)
        k, v = (t[:, :, None].expand(b, 2, 2, n, 8).reshape(b, 4, n, 8) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, n, 32))
        h = self.norm2(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return F.linear(self.norm3(x), self.tokens.weight)


class ConvNeXtBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 2, stride=2)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.norm = nn.LayerNorm(12)
        self.up, self.down = nn.Linear(12, 30), nn.Linear(30, 12)
        self.scale = nn.Parameter(torch.rand(12))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        return self.head((x + y.permute(0, 3, 1, 2)).mean((2, 3)))


class Mixed(nn.Module):
    """Grouped convolutions, excitations, shuffled channels, GroupNorm, a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.GroupNorm(3, 12)
        self.b = nn.Conv2d(12, 18, 3, padding=1, groups=3)
        self.squeeze, self.excite = nn.Conv2d(18, 5, 1), nn.Conv2d(5, 18, 1)
        self.wide = nn.Conv2d(18, 36, 3, padding=1, groups=18)
        self.up = nn.ConvTranspose2d(36, 8, 2, stride=2)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.b(F.silu(self.norm(self.a(x)))))
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        x = x.view(x.shape[0], 3, 6, *x.shape[2:]).transpose(1, 2).reshape_as(x)
        return {"out": self.head(F.relu(self.up(F.relu(self.wide(x)))))}


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(18, 3, 24, batch_first=True)
    return nn.Sequential(
        nn.Linear(6, 18), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(18, 3)
    )


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
NETWORKS = {
    "vision transformer": (VisionTransformer, IMAGES),
    "decoder": (Decoder, IDS),
    "convnext": (ConvNeXtBlock, IMAGES),
    "mixed": (Mixed, IMAGES),
    "encoder": (encoder, torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=5), IMAGES),
    "shufflenet": (lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=5), IMAGES.repeat(1, 1, 2, 2)),
}
"""Builder and example of each network."""


def build(name: str) -> nn.Module:
    """A network in eval mode with statistics that BatchNorm might have learnt."""
    torch.manual_seed(0)
    network = NETWORKS[name][0]().eval()
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 2)
            m.bias.data.normal_(0, 0.3)
    return network
