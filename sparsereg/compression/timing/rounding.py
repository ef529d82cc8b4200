"""How many channels to keep: a few closed ones more can make a faster network, as only a clock can tell."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn

from sparsereg.compression.batch_norm_folding import fuse
from sparsereg.compression.compact import compact
from sparsereg.compression.timing.latency import Timing, benchmark
from sparsereg.compression.timing.runtimes import Source

ROUNDINGS = (1, 4, 8, 16)
"""Multiples to which channels are rounded up in trials; kernels of today fill blocks of these sizes."""


def fastest_rounding(
    model: nn.Module,
    example_input: Any,
    *,
    runtimes: Sequence[str] = (),
    batch_sizes: Sequence[int] = (1, 32),
    threads: int | None = None,
    seconds: float = 20.0,
    make: Callable[[fx.GraphModule, int], Source] | None = None,
    on_step: Callable[[str], None] | None = None,
) -> tuple[int, tuple[Timing, ...]]:
    """Choose ``round_to`` of ``compact`` by timing: the multiple with the smallest product of all times.

    Args:
        model: with gates; left as it is.
        example_input: a batch as it takes it.
        runtimes: to time in, see ``benchmark``.
        batch_sizes: to time with.
        threads: how many may compute.
        seconds: for all timings.
        make: what is timed of each compacted network and its multiple, a quantized file say; the network with
            folded BatchNorm if None.
        on_step: is told what is being done.

    Returns:
        The multiple, and the timings of all that differ.
    """
    candidates: dict[str, Source] = {}
    sizes: set[int] = set()
    for multiple in ROUNDINGS:
        small = compact(model, example_input, round_to=multiple, check=False)
        size = sum(p.numel() for p in small.parameters())
        if size in sizes:
            continue
        sizes.add(size)
        if on_step is not None:
            on_step(f"round_to={multiple}")
        candidates[str(multiple)] = fuse(small) if make is None else make(small, multiple)
    if len(candidates) == 1:
        return 1, ()
    rows = benchmark(
        candidates,
        example_input,
        runtimes=runtimes,
        batch_sizes=batch_sizes,
        threads=threads,
        seconds=seconds,
    ).rows
    product = {name: sum(math.log(r.seconds) for r in rows if r.model == name) for name in candidates}
    return int(min(product, key=lambda name: product[name])), rows
