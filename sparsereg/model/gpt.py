"""A small decoder of tokens: a language model, and a classifier of texts on the same trunk.

Plain ``torch.nn`` without gates of its own.
"""

import torch
from torch import Tensor, nn

from sparsereg.checks import check_count
from sparsereg.model.transformer import POSITIONS, Block, Rotary, Shape, initialise_


class Decoder(nn.Module):
    """Tokens to states: embedding, positions, causal blocks, a norm.

    Args:
        vocabulary: number of different tokens, >= 1.
        context: largest number of tokens, >= 1.
        shape: of the transformer.
        positions: ``rotary`` or ``learned``.

    Raises:
        ValueError: an argument is outside its range.
    """

    def __init__(self, vocabulary: int, context: int, shape: Shape, positions: str = "rotary") -> None:
        super().__init__()
        if positions not in POSITIONS:
            raise ValueError(f"positions must be one of {', '.join(POSITIONS)}, got {positions!r}")
        self.context = check_count("context", context)
        self.tokens = nn.Embedding(check_count("vocabulary", vocabulary), shape.width)
        self.places = nn.Embedding(context, shape.width) if positions == "learned" else None
        rotary = Rotary(shape.head_dim, context) if positions == "rotary" else None
        self.blocks = nn.ModuleList(Block(shape, causal=True, rotary=rotary) for _ in range(shape.depth))
        self.norm = shape.make_norm()

    def forward(self, input_ids: Tensor) -> Tensor:
        """Map tokens (batch, length), int64, to states (batch, length, width)."""
        x = self.tokens(input_ids)
        if self.places is not None:
            x = x + self.places(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.blocks:
            x = block(x)
        states: Tensor = self.norm(x)
        return states


class GPT(nn.Module):
    """A language model: the logits of the token that comes next, at each place.

    Args:
        vocabulary: number of different tokens; 256 for bytes.
        context: largest number of tokens that it reads.
        shape: of the transformer; None: 4 blocks of width 128.
        positions: ``rotary`` or ``learned``.
        tied: whether the output layer has the weights of the embedding.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> net = GPT(256, 32, Shape(width=16, depth=1, heads=2))
        >>> net(torch.zeros(2, 7, dtype=torch.int64)).shape
        torch.Size([2, 7, 256])
    """

    def __init__(
        self,
        vocabulary: int = 256,
        context: int = 128,
        shape: Shape | None = None,
        positions: str = "rotary",
        tied: bool = True,
    ) -> None:
        super().__init__()
        shape = shape or Shape()
        self.decoder = Decoder(vocabulary, context, shape, positions)
        self.head = nn.Linear(shape.width, vocabulary, bias=False)
        initialise_(self, shape.depth)
        if tied:
            self.head.weight = self.decoder.tokens.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Map tokens (batch, length), int64, to logits (batch, length, vocabulary)."""
        logits: Tensor = self.head(self.decoder(input_ids))
        return logits


class TextClassifier(nn.Module):
    """The same trunk, and logits of the classes from the mean of its states.

    Args:
        num_classes: number of classes, >= 2.
        vocabulary: number of different tokens; 256 for bytes.
        context: largest number of tokens that it reads.
        shape: of the transformer; None: 4 blocks of width 128.
        positions: ``rotary`` or ``learned``.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> net = TextClassifier(3, 256, 32, Shape(width=16, depth=1, heads=2))
        >>> net(torch.zeros(2, 7, dtype=torch.int64), torch.ones(2, 7, dtype=torch.int64)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        num_classes: int,
        vocabulary: int = 256,
        context: int = 128,
        shape: Shape | None = None,
        positions: str = "rotary",
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be >= 2, got {num_classes!r}")
        shape = shape or Shape()
        self.decoder = Decoder(vocabulary, context, shape, positions)
        self.head = nn.Linear(shape.width, num_classes)
        initialise_(self, shape.depth)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Map tokens (batch, length) to logits (batch, num_classes).

        Args:
            input_ids: int64; a text ends with padding, which no place in front of it sees.
            attention_mask: 1 where there is text, 0 where there is padding; None: no padding.
        """
        states = self.decoder(input_ids)
        if attention_mask is None:
            mean = states.mean(1)
        else:
            mask = attention_mask.to(states.dtype)[:, :, None]
            mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
        logits: Tensor = self.head(mean)
        return logits
