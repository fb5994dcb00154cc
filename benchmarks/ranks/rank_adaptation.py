"""Where the ranks settle from start ranks 2, 4, 8, 16 and 32: adapter parameters and scores, and how they get there.

    python benchmarks/ranks/rank_adaptation.py

All settings but the start rank, and the 32 columns that the largest one needs, are this package's defaults. A second
series lets the ranks grow first. Runs are appended to ``benchmarks/results/rank_adaptation.jsonl`` and never repeated;
the figure is ``docs/figures/rank_adaptation.svg``.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is found from where this script lies

from collections.abc import Sequence
from itertools import product
from statistics import mean, median

from rich.console import Console
from rich.table import Table

from benchmarks.shared import figures, sweep
from benchmarks.shared.methods import GeoLoRA, default_lr
from benchmarks.shared.paths import RESULTS
from benchmarks.shared.results import Record
from benchmarks.shared.summary import spread

START_RANKS = (2, 4, 8, 16, 32)


def method(start_rank: int, grow: bool) -> GeoLoRA:
    """This package from a start rank, with or without ranks that grow first."""
    return GeoLoRA(adapter={"init_rank": start_rank, "max_rank": max(START_RANKS)}, callback={"grow": grow})


def series(records: Sequence[Record], grow: bool) -> list[Record]:
    """The series of runs in which ranks grew first, or the other one."""
    return [record for record in records if record["settings"]["callback"]["grow"] == grow]


def rows(records: Sequence[Record]) -> list[list[str]]:
    """One row per start rank, and one for how far apart they are; two cells per task, parameters and score.

    Args:
        records: From :func:`series`.
    """
    names = list(dict.fromkeys(record["task"] for record in records))
    lines = []
    for start in dict.fromkeys(record["method"] for record in records):
        cells = [start]
        for name in names:
            runs = [r for r in records if (r["task"], r["method"]) == (name, start)]
            cells += [f"{mean(r['parameters'] for r in runs):,.0f}", spread([r["score"] for r in runs])]
        lines.append(cells)
    apart = ["apart"]
    for name in names:
        of_start: dict[str, list[Record]] = {}
        for record in records:
            if record["task"] == name:
                of_start.setdefault(record["method"], []).append(record)
        sizes = [mean(r["parameters"] for r in runs) for runs in of_start.values()]
        scores = [mean(r["score"] for r in runs) for runs in of_start.values()]
        apart += [f"{max(sizes) / min(sizes) - 1:.0%}", f"{max(scores) - min(scores):.3f}"]
    return [*lines, apart]


def header(records: Sequence[Record]) -> list[str]:
    """Names of the columns of :func:`rows`."""
    names = dict.fromkeys(record["task"] for record in records)
    return ["start rank", *(f"{name} {what}" for name in names for what in ("parameters", "score"))]


def draw(records: Sequence[Record]) -> None:
    """Draw adapter parameters over steps: one panel per task and series, with one line per start rank."""
    names = list(dict.fromkeys(record["task"] for record in records))
    figure, axes = figures.panels(len(names), rows=2)
    for ax, (grow, name) in zip(axes, product((False, True), names), strict=True):
        of_task = [record for record in series(records, grow) if record["task"] == name]
        for i, start in enumerate(dict.fromkeys(record["method"] for record in of_task)):
            curves = [record["sizes"] for record in of_task if record["method"] == start]
            points = [[size for _, size in at] for at in zip(*curves, strict=True)]
            ranges = [(min(sizes), median(sizes), max(sizes)) for sizes in points]
            figures.band(ax, [step for step, _ in curves[0]], ranges, f"from {start}", f"C{i}")
        ax.set(title=f"{name}, ranks grow first" if grow else name, xlabel="step", xscale="log", yscale="log")
    for ax in axes[:: len(names)]:
        ax.set_ylabel("adapter parameters")
    axes[0].legend(fontsize="small")
    figures.save(figure, "rank_adaptation")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = sweep.make_parser(__doc__, ("digits", "held_out", "stsb", "mrpc"), RESULTS / "rank_adaptation.jsonl")
    args = parser.parse_args(arguments)
    runs, steps = sweep.start(Path(__file__), args)
    records = runs.make(
        [
            sweep.Planned(task, steps[task], str(rank), method(rank, grow), default_lr(), seed)
            for grow in (False, True)
            for task in args.tasks
            for rank in START_RANKS
            for seed in range(args.seeds)
        ]
    )
    draw(records)
    for grow in (False, True):
        table = Table(*header(records), title="ranks grow first" if grow else "the defaults")
        for row in rows(series(records, grow)):
            table.add_row(*row)
        Console().print(table)


if __name__ == "__main__":
    main()
