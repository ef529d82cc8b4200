"""The settings of ``data=...`` by the name of the source.

Nothing here imports PyTorch: the command line is checked before anything slow is loaded.
"""

from sparsereg.data.kind import KINDS, Data, kind

CONFIGS: dict[str, type[Data]] = {name: kind(name) for name in KINDS}
"""Settings of each ``data=NAME``."""
