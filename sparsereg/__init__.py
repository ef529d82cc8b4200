"""L0 regularization with Hard Concrete gates.

Names are looked up when they are first used, so that ``import sparsereg`` itself loads nothing heavy.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sparsereg.calibration import SparseCalibrationWeights
    from sparsereg.compression import compact, count, explain, export, gate, restore_class
    from sparsereg.compression.oneshot.pruning import shrink
    from sparsereg.distributions import HardConcrete
    from sparsereg.gates import FeatureGate, HybridGate, L0Gate, SampleGate
    from sparsereg.layers import L0Conv2d, L0DepthwiseConv2d, L0Linear, SparseMLP, prune_model
    from sparsereg.loops.lightning import Sparsify
    from sparsereg.loops.plain import Sparsifier
    from sparsereg.penalties import (
        PenaltyTracker,
        compute_l0_penalty,
        compute_l0l2_penalty,
        compute_l2_penalty,
        get_active_parameter_count,
        get_sparsity_stats,
    )
    from sparsereg.sparse import SparseL0Linear
    from sparsereg.temperature import TemperatureScheduler, update_temperatures

__all__ = [
    "FeatureGate",
    "HardConcrete",
    "HybridGate",
    "L0Conv2d",
    "L0DepthwiseConv2d",
    "L0Gate",
    "L0Linear",
    "PenaltyTracker",
    "SampleGate",
    "SparseCalibrationWeights",
    "SparseL0Linear",
    "SparseMLP",
    "Sparsifier",
    "Sparsify",
    "TemperatureScheduler",
    "compact",
    "compute_l0_penalty",
    "compute_l0l2_penalty",
    "compute_l2_penalty",
    "count",
    "explain",
    "export",
    "gate",
    "get_active_parameter_count",
    "get_sparsity_stats",
    "prune_model",
    "restore_class",
    "shrink",
    "update_temperatures",
]

_HOMES = {
    "distributions": ("HardConcrete",),
    "gates": ("FeatureGate", "HybridGate", "L0Gate", "SampleGate"),
    "layers": ("L0Conv2d", "L0DepthwiseConv2d", "L0Linear", "SparseMLP", "prune_model"),
    "penalties": (
        "PenaltyTracker",
        "compute_l0_penalty",
        "compute_l0l2_penalty",
        "compute_l2_penalty",
        "get_active_parameter_count",
        "get_sparsity_stats",
    ),
    "temperature": ("TemperatureScheduler", "update_temperatures"),
    "sparse": ("SparseL0Linear",),
    "calibration": ("SparseCalibrationWeights",),
    "compression.oneshot.pruning": ("shrink",),
    "compression": ("compact", "count", "explain", "export", "gate", "restore_class"),
    "loops.huggingface": ("SparsifyTrainer",),
    "loops.lightning": ("Sparsify",),
    "loops.plain": ("Sparsifier",),
}
_MODULES = {
    *(home.partition(".")[0] for home in _HOMES),
    *("data", "errors", "model", "progress", "sklearn", "training"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(_imported(_HOME[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"sparsereg.{name}")
    else:
        raise AttributeError(f"module 'sparsereg' has no attribute {name!r}")
    globals()[name] = value
    return value


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(f"sparsereg.{module}")
    except ModuleNotFoundError as error:
        from sparsereg.extras import missing

        raise missing(error) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
