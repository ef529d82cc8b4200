"""Blocks of a pre-norm transformer, without gates: attention, MLP, rotary positions.

Source: Vaswani et al. 2017, "Attention is all you need"; Xiong et al. 2020, "On layer normalization in the
transformer architecture" (the norm in front); Su et al. 2021, "RoFormer" (rotary positions); Shazeer 2020,
"GLU variants improve transformer" (SwiGLU); Zhang and Sennrich 2019, "Root mean square layer normalization".
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsereg.checks import check_below_one, check_count

POSITIONS = ("rotary", "learned")
MLPS = ("gelu", "swiglu")
NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


@dataclass(frozen=True)
class Shape:
    """Sizes of a transformer and its kinds of parts.

    Attributes:
        width: of the residual stream, a multiple of ``heads``.
        depth: number of blocks, >= 1.
        heads: of each attention, >= 1.
        mlp_ratio: units of an MLP over the width, > 0; those of ``swiglu`` are two thirds of that, which
            makes as many parameters.
        mlp: ``gelu`` or ``swiglu``.
        norm: ``layer`` or ``rms``.
        dropout: rate in [0, 1) of what attention and MLP add to the residual stream.

    Raises:
        ValueError: a value is outside its range.

    Example:
        >>> Shape(width=96, heads=4).head_dim
        24
    """

    width: int = 128
    depth: int = 4
    heads: int = 4
    mlp_ratio: float = 4.0
    mlp: str = "gelu"
    norm: str = "layer"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads"):
            check_count(name, getattr(self, name))
        check_below_one("dropout", self.dropout)
        if self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}")
        if not self.mlp_ratio > 0 or math.isinf(self.mlp_ratio):
            raise ValueError(f"mlp_ratio must be a number > 0, got {self.mlp_ratio!r}")
        for name, known in (("mlp", MLPS), ("norm", tuple(NORMS))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    @property
    def head_dim(self) -> int:
        """Dimensions of each head."""
        return self.width // self.heads

    @property
    def units(self) -> int:
        """Units of an MLP."""
        share = 2 / 3 if self.mlp == "swiglu" else 1.0
        return max(1, round(self.mlp_ratio * self.width * share))

    def make_norm(self) -> nn.Module:
        """Return a new norm over the width."""
        made: nn.Module = NORMS[self.norm](self.width)
        return made


class Rotary(nn.Module):
    """Turns pairs of dimensions of queries and keys by an angle that grows with the position.

    Args:
        head_dim: dimensions of a head, even.
        context: largest length.
        base: of the wave lengths.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, context: int, base: float = 10_000.0) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(
                f"rotary positions turn pairs of dimensions, but a head has {head_dim}: take another width "
                "or number of heads, or positions=learned"
            )
        frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angle = torch.outer(torch.arange(context, dtype=torch.float64), frequency)
        for name, table in (("cos", angle.cos()), ("sin", angle.sin())):
            self.register_buffer(name, torch.cat([table, table], 1).float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Turn (batch, heads, length, head_dim)."""
        length = x.shape[2]
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return x * self.cos[:length].to(x.dtype) + turned * self.sin[:length].to(x.dtype)


class Attention(nn.Module):
    """Self-attention by ``F.scaled_dot_product_attention``.

    Args:
        shape: of the transformer.
        causal: whether a place sees only itself and what stands before it.
        rotary: turns queries and keys; None: positions are in the residual stream.

    Example:
        >>> Attention(Shape(width=16, heads=2))(torch.zeros(3, 5, 16)).shape
        torch.Size([3, 5, 16])
    """

    def __init__(self, shape: Shape, causal: bool = False, rotary: Rotary | None = None) -> None:
        super().__init__()
        self.heads, self.head_dim, self.causal = shape.heads, shape.head_dim, causal
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)
        self.rotary = nn.Identity() if rotary is None else rotary

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, length, width) to the same shape."""
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(
            self.rotary(query), self.rotary(key), value, is_causal=self.causal
        )
        together: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return together


class Mlp(nn.Module):
    """Linear, GELU, linear.

    Args:
        shape: of the transformer.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.width, shape.units)
        self.out = nn.Linear(shape.units, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to the same shape."""
        mapped: Tensor = self.out(F.gelu(self.up(x)))
        return mapped


class SwiGlu(nn.Module):
    """An MLP whose units are multiplied by a second projection: out(silu(gate x) * up x), without biases.

    Args:
        shape: of the transformer.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.width, shape.units, bias=False)
        self.up = nn.Linear(shape.width, shape.units, bias=False)
        self.out = nn.Linear(shape.units, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to the same shape."""
        mapped: Tensor = self.out(F.silu(self.gate(x)) * self.up(x))
        return mapped


class Block(nn.Module):
    """Attention and an MLP, each behind a norm and added to the residual stream.

    Args:
        shape: of the transformer.
        causal: see ``Attention``.
        rotary: likewise.
    """

    def __init__(self, shape: Shape, causal: bool = False, rotary: Rotary | None = None) -> None:
        super().__init__()
        self.norm1, self.norm2 = shape.make_norm(), shape.make_norm()
        self.attention = Attention(shape, causal, rotary)
        self.mlp = SwiGlu(shape) if shape.mlp == "swiglu" else Mlp(shape)
        self.drop = nn.Dropout(shape.dropout) if shape.dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, length, width) to the same shape."""
        x = x + self.drop(self.attention(self.norm1(x)))
        added: Tensor = x + self.drop(self.mlp(self.norm2(x)))
        return added


def initialise_(model: nn.Module, depth: int) -> None:
    """Draw weights as GPT-2 does: normal with 0.02, smaller where they add to the residual stream.

    Source: Radford et al. 2019, "Language models are unsupervised multitask learners", section 2.3.

    Args:
        model: changed in place.
        depth: number of blocks, each of which adds twice.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            added = name.endswith((".attention.out", ".mlp.out"))
            nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * depth) if added else 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
