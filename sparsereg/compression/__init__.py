"""From closed gates to a smaller, faster network: count, compact, export, latency."""

from sparsereg.compression.compact import compact
from sparsereg.compression.count import Accountant, Count, LayerCount, count

__all__ = ["Accountant", "Count", "LayerCount", "compact", "count"]
