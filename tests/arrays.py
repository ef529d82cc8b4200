"""Checks the shapes that the mathematics declares, at every call that a test makes; see ``conftest.py``."""

from collections.abc import Callable
from typing import Any, get_args

from beartype import beartype

SOLVER = ("distances", "dual_newton", "exact", "hard_concrete", "interior_point", "least_squares", "losses")
SOLVER += ("matrix", "nested", "page_factors", "pruning", "recalibration", "refit", "selection")
CHECKED = (
    "sparsereg.distributions",
    "sparsereg.penalties",
    "sparsereg.sparse",
    "sparsereg.linalg.csr",
    "sparsereg.calibration.problem",
    "sparsereg.calibration.measures",
    *(f"sparsereg.calibration.solver.{name}" for name in SOLVER),
)
"""Modules whose functions say the shapes of their arrays. (What numba compiles cannot be wrapped.)"""


def check_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check the arrays among the arguments and what is returned; the function checks the rest itself."""
    hints = {name: hint for name, hint in function.__annotations__.items() if _has_shape(hint)}
    if not hints:
        return function
    function.__annotations__ = hints
    return beartype(function)


def _has_shape(hint: Any) -> bool:
    """Whether this is a type with a shape, or has one as a part."""
    return hasattr(hint, "dim_str") or any(_has_shape(part) for part in get_args(hint))
