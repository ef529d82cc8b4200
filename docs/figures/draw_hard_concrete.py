"""Draw hard_concrete.png: the test-time gate with and without the temperature, against quadrature.

Run ``python docs/figures/draw_hard_concrete.py`` in the repository.
"""

import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import integrate, optimize

from sparsereg.distributions import GAMMA, ZETA, gate_median, p_active, shift

TEMPERATURES = (0.1, 2 / 3, 2.0)
POINTS = np.linspace(-6, 6, 25)
CURVE = torch.linspace(-7, 7, 1401, dtype=torch.float64)


def mass_above(s: float, log_alpha: float, temperature: float) -> float:
    """P(S > s) of the binary concrete variable: the integral of its density over the log odds."""
    low = temperature * math.log(s / (1 - s)) - log_alpha
    if low > 40:
        return 0.0
    density = lambda t: 1 / (4 * math.cosh(t / 2) ** 2)  # noqa: E731
    return integrate.quad(density, max(low, -40.0), 40.0, points=[0.0] if low < 0 else None, limit=200)[0]


def true_median(log_alpha: float, temperature: float) -> float:
    """Median of the stretched and clipped variable, by root finding on the integral."""

    def excess(log_odds: float) -> float:
        return mass_above(1 / (1 + math.exp(-log_odds)), log_alpha, temperature) - 0.5

    log_odds = optimize.brentq(excess, -100, 36) if excess(36) < 0 else 36.0
    return min(1.0, max(0.0, (ZETA - GAMMA) / (1 + math.exp(-log_odds)) + GAMMA))


def draw() -> Figure:
    """One panel for each temperature."""
    figure = Figure(figsize=(11, 4.0), layout="constrained")
    for axes, temperature in zip(figure.subplots(1, 3, sharey=True), TEMPERATURES, strict=True):
        without = (torch.sigmoid(CURVE) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
        axes.plot(CURVE, gate_median(CURVE, temperature), color="C0", label="median, with the temperature")
        axes.plot(CURVE, without, color="C3", linestyle="--", label="without the temperature")
        axes.plot(CURVE, p_active(CURVE, temperature), color="0.6", linewidth=1, label="P(z > 0)")
        truth = [true_median(x, temperature) for x in POINTS]
        axes.plot(POINTS, truth, "o", color="k", markersize=3.5, label="median by quadrature")
        axes.axvline(shift(temperature), color="0.6", linestyle=":", label="P(z > 0) = 1/2")
        axes.set(title=f"temperature {temperature:.3g}", xlabel="log_alpha")
    figure.axes[0].set_ylabel("gate")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9)
    return figure


if __name__ == "__main__":
    draw().savefig(Path(__file__).with_name("hard_concrete.png"), dpi=130)
