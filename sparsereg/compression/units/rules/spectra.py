"""Fourier transforms and complex numbers: each unit by itself, whatever happens along the other axes."""

from __future__ import annotations

from typing import Any

from torch import fx

from sparsereg.compression.units.labels import Labels, live, varying
from sparsereg.compression.units.program import name_of
from sparsereg.compression.units.rules.elementwise import pair
from sparsereg.compression.units.rules.table import Dead, Labeller, rule

ONE_AXIS = ["fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft"]
_SEVERAL = [f"{name}{end}" for name in ONE_AXIS for end in ("2", "n")]
_SHIFTS = ("fft_fftshift", "fft_ifftshift")
SPECTRA = (*ONE_AXIS, *_SEVERAL, *_SHIFTS)
"""Transforms along some axes, of which zeros give zeros."""


@rule(*SPECTRA)
def transforms(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """Along axes without units; what runs over units mixes them."""
    labels = x.labels(a["self"])
    value = x.program.values[node]
    dims = _along(a.get("dim"), a.get("s"), labels.dim())
    if dims & varying(labels):
        x.axes.fix(labels, f"{name_of(node)} runs along it", node)
        return live(value.shape)
    for d in sorted(dims):
        labels = labels.narrow(d, 0, 1)
    return labels.expand(value.shape)


def _along(dim: int | list[int] | None, sizes: list[int] | None, rank: int) -> set[int]:
    if dim is None:
        return set(range(rank - len(sizes), rank)) if sizes else set(range(rank))
    return {d % rank for d in ([dim] if isinstance(dim, int) else dim)}


@rule("view_as_real")
def as_pairs(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """Two numbers along a new last axis."""
    labels = x.labels(a["self"])
    return labels.unsqueeze(-1).expand(*labels.shape, 2)


@rule("view_as_complex")
def of_pairs(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """Both numbers of a pair along the last axis go together."""
    labels = x.labels(a["self"])
    return pair(x, node, [labels.select(-1, 0), labels.select(-1, 1)])


@rule("complex", "polar")
def of_two(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """Zero where both parts are, or the modulus is."""
    parts = [a["real"], a["imag"]] if name_of(node) == "complex" else [a["abs"], a["angle"]]
    made = pair(x, node, [x.labels(p) for p in parts]).expand(x.program.values[node].shape)
    states = [x.dead.get(p, Dead.ZERO) if _has(x, p) else Dead.ANYTHING for p in parts]
    x.dead[node] = max(states) if name_of(node) == "complex" else states[0]
    return made


def _has(x: Labeller, source: Any) -> bool:
    return x.has_units(source) or source in x.program.weights


@rule("angle")
def angles(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """Zero, or pi, where zero is."""
    x.dead[node] = max(x.dead[node], Dead.ANYTHING)
    return x.labels(a["self"])
