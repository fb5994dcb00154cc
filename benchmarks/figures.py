"""What the figures share: one look, a median with its spread, files that do not change when the numbers do not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FOLDER = Path(__file__).parents[1] / "docs" / "figures"

plt.rcParams.update(
    {
        "svg.hashsalt": "geolora_pl",  # ids in the file are made from it and no longer random
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
)


def panels(number: int, rows: int = 1) -> tuple[Figure, Sequence[Axes]]:
    """A figure of some panels side by side, row after row."""
    figure, axes = plt.subplots(rows, number, figsize=(3.6 * number, 2.8 * rows), layout="constrained", squeeze=False)
    return figure, list(axes.flat)


def band(ax: Axes, x: Sequence[float], ranges: Sequence[Sequence[float]], label: str, color: str) -> None:
    """A line with the range around it.

    Args:
        ax: Where to draw.
        x: Horizontal positions.
        ranges: Least, middle and largest value at each.
        label: What it is.
        color: Of line and range.
    """
    least, middle, largest = zip(*ranges, strict=True) if ranges else ((), (), ())
    ax.plot(x, middle, label=label, color=color)
    ax.fill_between(x, least, largest, alpha=0.2, color=color, linewidth=0)


def save(figure: Figure, name: str) -> None:
    """Write ``docs/figures/NAME.svg``."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)
