"""What each kind of operation does to labels, and how it is called on what is left: one file a family."""

from sparsereg.compression.units.rules import (  # noqa: F401  (each registers its rules)
    attention,
    cells,
    elementwise,
    experts,
    indexed,
    mixing,
    moves,
    norms,
    products,
    recurrent,
    reductions,
    spectra,
)
from sparsereg.compression.units.rules.table import RULES

__all__ = ["RULES"]
