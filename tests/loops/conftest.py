import math

import numpy as np
import pytest

from sparsereg.compression.timing.runtimes import Loaded
from sparsereg.compression.timing.times import Grid


def _seconds(network):
    """Ten nanoseconds for each parameter, and what a call costs."""
    return 1e-8 * sum(p.numel() for p in network.parameters()) + 1e-6


class _ByParameters:
    """Loads networks that take as long as they have parameters."""

    def __init__(self, example_input, threads):
        assert threads == 1

    def load(self, network, runtime):
        assert runtime == "eager"
        return Loaded(lambda given: given, lambda given: _seconds(network), lambda answer: ())

    anew = load

    def forget(self, network):
        """Nothing is kept."""


class _Products:
    """Layers that take half as long as their weights would make them: a model to be corrected."""

    def __init__(self, runtime, threads, batch):
        """All that is known of a layer is its shape."""

    def grid(self, layer):
        widths = (0, layer.inputs), (0, layer.outputs)
        seconds = 0.5e-8 * math.prod(layer.kernel) * layer.inputs * layer.outputs
        return Grid(*widths, np.array([[0.0, 0.0], [0.0, seconds]]))

    def save(self):
        """Nothing is kept."""


@pytest.fixture
def milliseconds(monkeypatch):
    """What a network takes by a clock that counts parameters: the one that budgets measure with."""
    monkeypatch.setattr("sparsereg.compression.timing.measured.Clock", _Products)
    monkeypatch.setattr("sparsereg.compression.timing.measured.Loaders", _ByParameters)
    monkeypatch.setattr(
        "sparsereg.compression.timing.measured.seconds_in_a_row",
        lambda loaded, given, threads, seconds: loaded.run(given),
    )
    return lambda network: 1e3 * _seconds(network)
