"""From closed gates to a smaller, faster network: count, compact, export, latency."""

from sparsereg.compression.batch_norm_folding import fuse
from sparsereg.compression.compact import compact, original_size
from sparsereg.compression.count import Accountant, Count, LayerCount, count
from sparsereg.compression.deploy import export, shift_pools
from sparsereg.compression.insert import gate
from sparsereg.compression.quantization import quantize
from sparsereg.compression.restore import restore_class
from sparsereg.compression.storage import is_compacted, load_compacted, save_compacted
from sparsereg.compression.timing.latency import Latency, Timing, benchmark
from sparsereg.compression.units.explain import Explanation, explain

__all__ = [
    "Accountant",
    "Count",
    "Explanation",
    "Latency",
    "LayerCount",
    "Timing",
    "benchmark",
    "compact",
    "count",
    "explain",
    "export",
    "fuse",
    "gate",
    "is_compacted",
    "load_compacted",
    "original_size",
    "quantize",
    "restore_class",
    "save_compacted",
    "shift_pools",
]
