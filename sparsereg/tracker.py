"""Histories of named numbers during training, as a table and as a plot."""

import csv
import itertools
import os
from pathlib import Path

import torch

from sparsereg.files import write_atomically
from sparsereg.table_file import inert


class History:
    """Histories of named numbers during training."""

    def __init__(self) -> None:
        self.history: dict[str, list[float]] = {}

    def log(self, name: str, value: float) -> None:
        """Append a number (or a tensor with one element) to a history."""
        self.history.setdefault(name, []).append(float(value))

    def get_history(self, name: str) -> list[float]:
        """All numbers logged under a name, in order; empty for a name that was never logged."""
        return list(self.history.get(name, []))

    def get_stats(self, name: str) -> dict[str, float]:
        """``mean``, ``std`` (of the population), ``min``, ``max`` and ``last``; empty if never logged."""
        values = self.get_history(name)
        if not values:
            return {}
        x = torch.tensor(values, dtype=torch.float64)
        return {
            "mean": x.mean().item(),
            "std": x.std(correction=0).item(),
            "min": x.min().item(),
            "max": x.max().item(),
            "last": values[-1],
        }

    def clear(self) -> None:
        """Forget everything."""
        self.history.clear()

    def save_to_csv(self, filepath: str | os.PathLike[str]) -> None:
        """Write one column for each name; a shorter history ends in empty cells.

        Args:
            filepath: where to; the file appears whole or not at all.
        """

        def write(path: Path) -> None:
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(inert(name) for name in self.history)
                writer.writerows(itertools.zip_longest(*self.history.values(), fillvalue=""))

        write_atomically(Path(filepath), write)

    def plot_history(self, metrics: list[str] | None = None, save_path: str | None = None) -> None:
        """Draw histories below each other.

        Args:
            metrics: names to draw; all if None.
            save_path: image file to write; the figure is shown on the screen if None.

        Raises:
            ValueError: a name was never logged, or nothing was.
        """
        names = list(self.history) if metrics is None else metrics
        unknown = [name for name in names if name not in self.history]
        if unknown or not names:
            known = ", ".join(self.history) or "(nothing was logged)"
            raise ValueError(f"metrics must be among {known}, got {names}")
        if save_path is None:
            import matplotlib.pyplot as plt

            figure = plt.figure(figsize=(10, 4 * len(names)), layout="tight")
        else:
            from matplotlib.figure import Figure

            figure = Figure(figsize=(10, 4 * len(names)), layout="tight")
        for i, name in enumerate(names):
            axes = figure.add_subplot(len(names), 1, i + 1)
            axes.plot(self.history[name])
            axes.set(title=name, xlabel="step", ylabel="value")
            axes.grid(visible=True)
        if save_path is None:
            plt.show()
        else:
            write_atomically(Path(save_path), figure.savefig)
