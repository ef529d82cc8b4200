"""Draw the figures of docs/gates.md.

python docs/figures/draw.py gated_channel
python docs/figures/draw.py inception_block
python docs/figures/draw.py l_c0 RUN [RUN ...]    run folders of train.py, e.g. of a sweep over lambda_l0
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

HERE = Path(__file__).parent
PLAIN, GATE, SHUT = "#dce6f2", "#f6d9a8", "#eeeeee"


def box(axes: Axes, x: float, y: float, width: float, text: str, colour: str = PLAIN) -> None:
    """A labelled box, centred."""
    corner = (x - width / 2, y - 0.3)
    axes.add_patch(Rectangle(corner, width, 0.6, facecolor=colour, edgecolor="black", lw=0.8))
    axes.text(x, y, text, ha="center", va="center", fontsize=8)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """An arrow between two points."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, lw=0.8, color="black"))


def gated_channel() -> None:
    """A convolution's filters, their channels, one of them shut, and what goes with it."""
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    for i, z in enumerate((1.0, 0.0, 0.4)):
        y = 2 - i
        colour = SHUT if z == 0 else PLAIN
        box(axes, 0.9, y, 1.6, f"filter {i}", colour)
        box(axes, 3.2, y, 2.2, f"BatchNorm: $w_{i} x + b_{i}$", colour)
        box(axes, 5.2, y, 0.9, f"$z_{i}$ = {z:g}", GATE)
        box(axes, 6.6, y, 1.0, "ReLU", colour)
        box(axes, 8.8, y, 2.4, f"channel {i}" + (": exactly 0" if z == 0 else ""), colour)
        box(axes, 11.6, y, 2.2, f"weights reading {i}", colour)
        for a, b in ((1.7, 2.1), (4.3, 4.75), (5.65, 6.1), (7.1, 7.6), (10.0, 10.5)):
            arrow(axes, (a, y), (b, y))
    axes.text(0.1, -0.9, "grey: goes when the network is compacted; z is folded into the affine, "
              "$z (w x + b) = (z w) x + (z b)$", fontsize=9)  # fmt: skip
    finish(figure, axes, (0, 12.8), (-1.2, 2.5), "gated_channel.png")


def inception_block() -> None:
    """The four branches of a block of the small GoogleNet and where their gates are."""
    from sparsereg.model.googlenet import BLOCKS

    block = BLOCKS[0]
    assert block is not None
    (one, three, five, pool), (red3, red5) = block
    branches = [
        [(f"conv 1x1, {one}", True)],
        [(f"conv 1x1, {red3}", False), (f"conv 3x3, {three}", True)],
        [(f"conv 1x1, {red5}", False), (f"conv 5x5, {five}", True)],
        [("max-pooling 3x3", None), (f"conv 1x1, {pool}", True)],
    ]
    top = 4.4  # where the longest branches end
    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    box(axes, 6, 0, 4, "input of the block, 64 channels")
    for i, branch in enumerate(branches):
        x, y = 1.6 + 2.95 * i, 1.2
        arrow(axes, (6, 0.3), (x, y - 0.3))
        for j, (text, gate) in enumerate(branch):
            if j:
                arrow(axes, (x, y - 0.7), (x, y - 0.3))
            box(axes, x, y, 2.6, text + ("" if gate is None else ", BatchNorm"))
            if gate is not None:
                y += 0.6
                box(axes, x, y, 2.6, "gates" if gate else "gates with gate=all", GATE if gate else "#fbf1de")
            y += 1.0
        axes.plot([x, x], [y - 0.7, top], color="black", lw=0.8)
        arrow(axes, (x, top), (4.7 + 0.87 * i, 5.3))
    box(axes, 6, 5.6, 4, f"concatenation, {one + three + five + pool} channels")
    finish(figure, axes, (0, 12.2), (-0.5, 6.1), "inception_block.png")


def l_c0(runs: list[str]) -> None:
    """L_C0 over the training steps of runs, read from their event files."""
    from omegaconf import OmegaConf
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = []
    for run in runs:
        events = EventAccumulator(run)
        events.Reload()
        scalars = events.Scalars("L_C0")
        curves.append((OmegaConf.load(Path(run) / "config.yaml").lambda_l0, scalars))
    figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
    for value, scalars in sorted(curves, key=lambda c: c[0]):
        axes.plot([s.step for s in scalars], [s.value for s in scalars], label=f"lambda_l0 = {value:g}")
    axes.set_xlabel("training step")
    axes.set_ylabel("L_C0")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(HERE / "l_c0.png", dpi=130)


def finish(figure: plt.Figure, axes: Axes, x: tuple[float, float], y: tuple[float, float], name: str) -> None:
    """Set the limits and save."""
    axes.set_xlim(*x)
    axes.set_ylim(*y)
    axes.axis("off")
    figure.savefig(HERE / name, dpi=130)


if __name__ == "__main__":
    drawings = {"gated_channel": gated_channel, "inception_block": inception_block}
    if len(sys.argv) == 2 and sys.argv[1] in drawings:
        drawings[sys.argv[1]]()
    elif len(sys.argv) > 2 and sys.argv[1] == "l_c0":
        l_c0(sys.argv[2:])
    else:
        sys.exit(__doc__)
