"""What the figures share: one style, a line with its range, and files that change only when the numbers do."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.shared.paths import FIGURES

plt.rcParams.update(
    {
        "svg.hashsalt": "geolora_pl",  # the ids in the file are made from it instead of at random
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
)


def panels(number: int, rows: int = 1) -> tuple[Figure, Sequence[Axes]]:
    """A figure with rows of panels side by side, and its panels row by row."""
    figure, axes = plt.subplots(rows, number, figsize=(3.6 * number, 2.8 * rows), layout="constrained", squeeze=False)
    return figure, list(axes.flat)


def band(ax: Axes, x: Sequence[float], ranges: Sequence[Sequence[float]], label: str, color: str) -> None:
    """A line with the range around it.

    Args:
        ax: Where to draw.
        x: Positions on the x axis.
        ranges: Smallest, middle and largest value at each of them.
        label: Name of the line in the legend.
        color: Color of the line and of its range.
    """
    least, middle, largest = zip(*ranges, strict=True) if ranges else ((), (), ())
    ax.plot(x, middle, label=label, color=color)
    ax.fill_between(x, least, largest, alpha=0.2, color=color, linewidth=0)


def save(figure: Figure, name: str) -> None:
    """Write ``docs/figures/NAME.svg``."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURES / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)
