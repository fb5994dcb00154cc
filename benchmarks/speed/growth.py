"""How the cost of a step grows with the width, depth, rank and batch of a BERT."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from benchmarks.shared import figures
from benchmarks.speed import random_models, timing
from benchmarks.speed.random_models import Setup

SIZES = (256, 4, 4)  # width, depth and heads of the BERT, where they do not grow
WIDTHS = (128, 256, 384, 768)
DEPTHS = (2, 4, 8, 12)
RANKS = (4, 8, 16, 32, 64)
BATCHES = (2, 4, 8, 16, 32)
METHODS = ("geolora", "lora", "adalora", "full", "bound")
COLORS = {name: f"C{i}" for i, name in enumerate(METHODS)}


def setups(base: Setup) -> Iterator[tuple[str, int, Setup]]:
    """Every setup, with the name and the size of what grows in it."""
    base = replace(base, name="bert", rank=8, batch_size=8, length=64, sizes=SIZES)
    _, depth, heads = SIZES
    for width in WIDTHS:
        yield "width", width, replace(base, sizes=(width, depth, width // 64))
    for more in DEPTHS:
        yield "depth", more, replace(base, sizes=(SIZES[0], more, heads))
    for rank in RANKS:
        yield "rank", rank, replace(base, rank=rank)
    for batch_size in BATCHES:
        yield "batch", batch_size, replace(base, batch_size=batch_size)


def measure(base: Setup, rounds: int) -> list[dict[str, Any]]:
    """The cost of a step at every size; a setup that occurs several times is measured once."""
    found: dict[Setup, dict[str, Any]] = {}
    records = []
    for what, size, setup in setups(base):
        if setup not in found:
            methods = {name: timing.compared_at(setup.rank)[name] for name in METHODS}
            times = timing.measure(setup, random_models.load(setup), methods, rounds)
            found[setup] = timing.summary(times, setup.amount)
        records.append({"grows": what, "size": size, "setup": asdict(setup), "step": found[setup]})
    return records


def draw(records: Sequence[dict[str, Any]]) -> None:
    """Draw milliseconds per step over each of the four sizes, and the ratio to the frozen layers in the lower row."""
    grown = list(dict.fromkeys(record["grows"] for record in records))
    figure, axes = figures.panels(len(grown), rows=2)
    for column, what in enumerate(grown):
        of_what = [record for record in records if record["grows"] == what]
        sizes = [record["size"] for record in of_what]
        top, bottom = axes[column], axes[len(grown) + column]
        for name, color in COLORS.items():
            top.plot(sizes, [record["step"][name]["ms"] for record in of_what], label=name, color=color)
            if name != "bound":
                ratios = [record["step"][name]["over"]["bound"] for record in of_what]
                figures.band(bottom, sizes, ratios, name, color)
        top.set(xscale="log", yscale="log", ylabel="milliseconds per step" if column == 0 else None)
        bottom.set(xscale="log", xlabel=what, ylabel="over frozen layers" if column == 0 else None)
        for ax in (top, bottom):
            ax.set_xticks(sizes, [str(size) for size in sizes])
            ax.minorticks_off()
    axes[0].legend(fontsize="small")
    figures.save(figure, "throughput")
