"""Channel counts that the hardware likes: keep some closed channels so that the rest is a multiple."""

import numpy as np

from sparsereg.compression.graph import Analysis, Network
from sparsereg.compression.ops import Mask, Mixing, Norm


def rounded_pins(network: Network, analysis: Analysis, multiple: int) -> dict[str, Mask]:
    """Choose the closed channels to keep, the first ones of every layer with gates.

    A layer that goes altogether still goes, and no layer gets more channels than it had.

    Args:
        network: the traced network.
        analysis: which channels stay without rounding.
        multiple: the number that the count of channels is to be a multiple of.

    Returns:
        Masks for ``Network.analyse``, by the name of the tensor.
    """
    pins: dict[str, Mask] = {}
    for name, op in network.ops.items():
        if not isinstance(op, Mixing | Norm) or not op.gates or name not in analysis.kept:
            continue
        kept = analysis.kept[name]
        missing = -int(kept.sum()) % multiple
        spare = np.flatnonzero(~kept)[:missing]
        if len(spare):
            pins[name] = np.zeros(op.width, dtype=bool)
            pins[name][spare] = True
    return pins
