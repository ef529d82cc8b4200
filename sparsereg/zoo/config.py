"""The settings of ``model=...`` by the name of the kind of network.

Nothing here imports PyTorch: the command line is checked before anything slow is loaded.
"""

from sparsereg.zoo.network import KINDS, Network, kind

CONFIGS: dict[str, type[Network]] = {name: kind(name) for name in KINDS}
"""Settings of each ``model=NAME``."""


def weights_file(network: Network) -> str | None:
    """Return the file that a network's weights are read from, if its kind has one."""
    file: str | None = getattr(network, "weights", None)
    return file
