"""The scale of a target: what its errors are compared with."""

from __future__ import annotations

import numpy as np

_NET_SHARE = 1e-3
"""Share of what goes into a total, signs left aside, that its error is at least compared with."""


def target_scale(targets: np.ndarray, own: np.ndarray | None, gross: np.ndarray) -> np.ndarray:
    """Return the scales, > 0: the largest of |target|, its own scale, and a thousandth of what goes into it.

    So a target of zero, or a difference of large totals, is not judged in single units.

    Args:
        targets: Shape (targets,), each in a unit of its own, as all that follows.
        own: Scales that were given, >= 0; None: none were.
        gross: What goes into each target, signs left aside, see ``CalibrationProblem.gross``.
    """
    least = 0.0 if own is None else own
    scale = np.maximum(np.maximum(np.abs(targets), least), _NET_SHARE * gross)
    return np.where(scale > 0, scale, 1.0)
