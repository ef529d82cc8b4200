"""Inputs that must have one size, in a network that was compacted for it."""

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

ANY = -1
"""Stands for a size that may differ from call to call; -n for one that is at least n."""


def of_size(x: Tensor, sizes: list[int]) -> Tensor:
    """Return an input as it is, if it has the sizes that the network was compacted for.

    Args:
        x: an input of the network.
        sizes: its dimensions' sizes; -n for one that may differ and is at least n.

    Raises:
        ValueError: it has others.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(of_size, (x,), x, sizes)
    fits = x.dim() == len(sizes)
    if fits:
        for found, wanted in zip(x.shape, sizes):  # noqa: B905 (TorchScript knows no strict)
            fits = fits and (found == wanted or found >= -wanted > 0)
    if not fits:
        shape = list(x.shape)
        raise ValueError(
            f"this network was compacted for inputs of shape {sizes} (-1: any, -n: at least n) and depends on"
            f" it, got {shape}; compact it with an example of the size that it will get"
        )
    return x
