"""Inputs that must have one size, or one of some, in a network that was compacted for it."""

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

ANY = -1
"""Stands for a size that may differ from call to call; -n for one that is at least n."""


def of_size(
    x: Tensor, sizes: list[int], most: list[int] | None = None, step: list[int] | None = None
) -> Tensor:
    """Return an input as it is, if it has the sizes that the network was compacted for.

    Args:
        x: an input of the network.
        sizes: its dimensions' sizes; -n for one that may differ and is at least n.
        most: the largest sizes of those that may differ; 0 where there is none.
        step: k for sizes that must be multiples of k, -k for those that must not be; 0 for any.

    Raises:
        ValueError: it has others.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(of_size, (x,), x, sizes, most, step)
    fits = x.dim() == len(sizes)
    if fits:
        for found, wanted in zip(x.shape, sizes):  # noqa: B905 (TorchScript knows no strict)
            fits = fits and (found == wanted or wanted == -1 or found >= -wanted > 0)
    if fits and most is not None:
        for found, wanted in zip(x.shape, most):  # noqa: B905
            fits = fits and (wanted == 0 or found <= wanted)
    if fits and step is not None:
        for found, wanted in zip(x.shape, step):  # noqa: B905
            if wanted > 0:
                fits = fits and found % wanted == 0
            if wanted < 0:
                fits = fits and found % -wanted != 0
    if not fits:
        shape = list(x.shape)
        further = ""
        if most is not None:
            further += f", at most {most} (0: any)"
        if step is not None:
            further += f", multiples of {step} (0: any, -n: none of n)"
        raise ValueError(
            f"this network was compacted for inputs of shape {sizes} (-1: any, -n: at least n){further} and"
            f" depends on it, got {shape}; compact it with an example of the size that it will get"
        )
    return x
