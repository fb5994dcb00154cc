"""Where a step is cheaper than LoRA's, and by how much: rows of input per step by width of the layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import TwoSlopeNorm

from benchmarks.shared import figures
from benchmarks.speed import random_models, timing
from benchmarks.speed.random_models import Setup

WIDTHS = (256, 384, 512, 768, 1024)
ROWS = (128, 256, 512, 1024, 2048)
THREADS = (1, 2)
LENGTH = 64  # tokens per text
DEPTH = 2
METHODS = ("defaults", "lora", "bound")


def setups(base: Setup) -> Iterator[Setup]:
    """A BERT of two blocks for every width and number of rows."""
    for width, rows in product(WIDTHS, ROWS):
        yield replace(base, batch_size=rows // LENGTH, length=LENGTH, sizes=(width, DEPTH, width // 64))


def measure(base: Setup, rounds: int) -> list[dict[str, Any]]:
    """The cost of a step in every setup.

    Args:
        base: Device, precision and threads.
        rounds: A multiple of the cadence of adaptations.
    """
    methods = {name: timing.compared_at(base.rank)[name] for name in METHODS}
    records = []
    for setup in setups(base):
        times = timing.measure(setup, random_models.load(setup), methods, rounds)
        records.append({"setup": asdict(setup), "step": timing.summary(times, setup.amount)})
    return records


def draw(records: Sequence[dict[str, Any]]) -> None:
    """Draw one map per number of threads: below one this package is cheaper than LoRA."""
    threads = sorted({record["setup"]["threads"] for record in records})
    figure, axes = figures.panels(len(threads))
    for ax, number in zip(axes, threads, strict=True):
        over = np.full((len(ROWS), len(WIDTHS)), np.nan)
        for record in records:
            setup = record["setup"]
            if setup["threads"] == number:
                row, column = ROWS.index(setup["batch_size"] * setup["length"]), WIDTHS.index(setup["sizes"][0])
                over[row, column] = record["step"]["defaults"]["over"]["lora"][1]
        image = ax.imshow(over, cmap="RdBu_r", norm=TwoSlopeNorm(1, 0.8, 1.2), origin="lower", aspect="auto")
        for (row, column), value in np.ndenumerate(over):
            ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize="small")
        ax.set_xticks(range(len(WIDTHS)), [str(width) for width in WIDTHS])
        ax.set_yticks(range(len(ROWS)), [str(rows) for rows in ROWS])
        ax.set(xlabel="width", ylabel="rows", title=f"{number} thread{'s' * (number > 1)}")
        plt.colorbar(image, ax=ax, label="step over LoRA's")
    figures.save(figure, "rows_by_width")
