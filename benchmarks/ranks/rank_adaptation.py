"""Where the ranks settle from start ranks 1 to 32: adapter parameters and scores, and how they get there.

    python benchmarks/ranks/rank_adaptation.py

All settings but the start rank, and the 32 columns that the largest one needs, are this package's defaults. Runs are
appended to ``benchmarks/results/rank_adaptation.jsonl`` and never repeated; the figure is
``docs/figures/rank_adaptation.svg``.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is found from where this script lies

from collections.abc import Sequence
from statistics import mean, median

from rich.console import Console

from benchmarks.shared import figures, sweep
from benchmarks.shared.methods import GeoLoRA, default_lr
from benchmarks.shared.paths import RESULTS
from benchmarks.shared.results import Record
from benchmarks.shared.summary import spread
from benchmarks.shared.tables import table

START_RANKS = (1, 2, 4, 8, 16, 32)
METHODS = {
    str(rank): GeoLoRA(adapter={"init_rank": rank, "max_rank": max(START_RANKS)}) for rank in START_RANKS
}  # this package from each start rank


def rows(records: Sequence[Record]) -> list[list[str]]:
    """One row per start rank, and one for how far apart they are; two cells per task, parameters and score."""
    names = list(dict.fromkeys(record["task"] for record in records))
    lines = []
    for start in dict.fromkeys(record["method"] for record in records):
        cells = [start]
        for name in names:
            runs = [r for r in records if (r["task"], r["method"]) == (name, start)]
            cells += [f"{mean(r['parameters'] for r in runs):,.0f}", spread([r["score"] for r in runs])]
        lines.append(cells)
    if not lines:
        return []
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
    """Draw adapter parameters over steps: one panel per task, with one line per start rank."""
    names = list(dict.fromkeys(record["task"] for record in records))
    figure, axes = figures.panels(len(names))
    for ax, name in zip(axes, names, strict=True):
        of_task = [record for record in records if record["task"] == name]
        for i, start in enumerate(dict.fromkeys(record["method"] for record in of_task)):
            curves = [record["sizes"] for record in of_task if record["method"] == start]
            points = [[size for _, size in at] for at in zip(*curves, strict=True)]
            ranges = [(min(sizes), median(sizes), max(sizes)) for sizes in points]
            figures.band(ax, [step for step, _ in curves[0]], ranges, f"from {start}", f"C{i}")
        ax.set(title=name, xlabel="step", xscale="log", yscale="log")
    axes[0].set_ylabel("adapter parameters")
    axes[0].legend(fontsize="small")
    figures.save(figure, "rank_adaptation")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = sweep.make_parser(
        __doc__, ("digits", "held_out", "stsb", "mrpc", "sst2"), RESULTS / "rank_adaptation.jsonl"
    )
    args = parser.parse_args(arguments)
    runs, steps = sweep.start(Path(__file__), args)
    records = runs.make(
        [
            sweep.Planned(task, steps[task], name, method, default_lr(), seed)
            for task in args.tasks
            for name, method in METHODS.items()
            for seed in range(args.seeds)
        ]
    )
    draw(records)
    Console().print(table(header(records), rows(records)))


if __name__ == "__main__":
    main()
