"""How far the answers of networks are from those of another, whatever they consist of."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsereg.compression.running import evaluating, tensors_in
from sparsereg.compression.units.explain import inputs_of
from sparsereg.compression.walk import Route
from sparsereg.errors import InputError

AT_ONCE = 2**22
"""Numbers of answers in float64 at a time."""
_ROUNDING = 1e-10
"""Share of the mean square of an answer below which a variance is none."""


def unexplained(whole: nn.Module, others: Sequence[nn.Module], batches: Sequence[Any]) -> list[float]:
    """Share of the variance of a network's answers that those of other networks leave unexplained.

    Each number of an answer is compared over the examples, up to a shift and a factor of its own: these are
    what training on mends first, and far from the network they are most of the difference. Beyond that
    nothing is asked of what answers mean: logits, coordinates and states are compared alike. Of several sets
    of answers, and of inputs of several sizes, it is the mean of the shares.

    Memory is that of a few float64 numbers for each number of one example's answers.

    Args:
        whole: the network.
        others: networks of the same inputs and answers.
        batches: of inputs, examples along the first axis.

    Returns:
        Of each of the others, in [0, 1]; 0 where there is nothing to compare.
    """
    moments: dict[Any, list[Tensor]] = {}
    with evaluating(whole, *others):
        for batch in batches:
            wanted = _answers(whole, batch)
            given = [_answers(other, batch) for other in others]
            for i, own in enumerate(wanted):
                for k, theirs in enumerate(given):
                    here = moments.setdefault((i, own.shape[1:]), [_none(own) for _ in others])
                    here[k] += _moments(own, theirs[i])
    shares = [[_share(own) for own in of_all] for of_all in moments.values()]
    return [sum(column) / len(shares) for column in zip(*shares, strict=True)] or [0.0] * len(others)


def check_answers(network: nn.Module, batches: Sequence[Any]) -> None:
    """See ``check_answer``, of all batches.

    Args:
        network: that is to be made smaller.
        batches: of inputs.
    """
    with evaluating(network):
        for i, batch in enumerate(batches):
            args, kwargs = inputs_of(batch)
            check_answer(network(*args, **kwargs), i)


def check_answer(answer: Any, i: int) -> None:
    """Raise an InputError if a network answers NaN: nothing could be ranked by it or fitted to it.

    Args:
        answer: of the network.
        i: place of the batch among all.
    """
    if any(bool(part.isnan().any()) for part in _numbers(answer)):
        raise InputError(
            f"the network answers NaN to batch {i} of the inputs: look for NaN or infinity in them and in its"
            " weights"
        )


def _answers(network: nn.Module, batch: Any) -> list[Tensor]:
    if isinstance(network, fx.GraphModule):
        return _numbers(Route(network).start(batch).answer())
    args, kwargs = inputs_of(batch)
    return _numbers(network(*args, **kwargs))


def _numbers(answer: Any) -> list[Tensor]:
    return [x for x in tensors_in(answer) if x.is_floating_point() and x.dim()]


def _none(answers: Tensor) -> Tensor:
    return answers.new_zeros(6, *answers.shape[1:], dtype=torch.float64)


def _moments(wanted: Tensor, given: Tensor) -> Tensor:
    """Of each number of an answer how many there are, and sums of both, their squares and their product.

    Where the wanted ones are not finite, such as masks, nothing is compared.
    """
    total = _none(wanted)
    some = max(1, AT_ONCE // max(1, wanted[0].numel())) if len(wanted) else 1
    for a, b in zip(wanted.split(some), given.split(some), strict=True):
        there = a.isfinite()
        x, y = (torch.where(there, v, 0).double() for v in (a, b))
        total += torch.stack([v.sum(0) for v in (there, x, y, x * x, y * y, x * y)])
    return total


def _share(moments: Tensor) -> float:
    """The share of variance that a line through the given answers leaves over of the wanted ones."""
    num, x, y, xx, yy, xy = moments
    num = num.clamp(min=1)
    wanted, given = (_variances(total, squares, num) for total, squares in ((x, xx), (y, yy)))
    explained = (xy - x * y / num).square() / given
    # An answer that is constant, or not finite, explains nothing.
    explained = torch.where((given > 0) & explained.isfinite(), explained, 0).minimum(wanted)
    total = float(wanted.sum())
    return float((wanted - explained).sum()) / total if total > 0 else 0.0


def _variances(total: Tensor, squares: Tensor, num: Tensor) -> Tensor:
    """Sums of squares around the mean; 0 where they are rounding."""
    around = squares - total * total / num
    return torch.where(around > _ROUNDING * squares, around, 0)
