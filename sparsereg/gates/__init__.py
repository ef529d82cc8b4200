"""Selectors: gates on the items of a data set, its rows or its columns.

These are l0-python's gates, vectors that choose items. The gates that multiply the feature maps of a
network are another class, ``sparsereg.model.basic_l0_blocks.L0Gate``.
"""

from sparsereg.gates.feature import FeatureGate
from sparsereg.gates.hybrid import HybridGate
from sparsereg.gates.l0_gate import L0Gate
from sparsereg.gates.sample import SampleGate

__all__ = ["FeatureGate", "HybridGate", "L0Gate", "SampleGate"]
