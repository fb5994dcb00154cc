"""Scores against parameters: LoRA at five ranks beside this package at four tolerances and at four budgets.

    python benchmarks/peers/pareto.py
    python benchmarks/peers/pareto.py --tasks rotated

Runs are those of ``epochs.py``: whole epochs, its seeds, and the learning rates that it chooses for LoRA of rank 8 and
for this package's defaults, which all ranks, tolerances and budgets share. They lie in its file, and the figure is
``docs/figures/pareto.svg``.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is found from where this script lies

from collections.abc import Sequence

from matplotlib.ticker import EngFormatter
from rich.console import Console

from benchmarks.peers import epochs
from benchmarks.shared import figures, sweep, tasks
from benchmarks.shared.methods import GeoLoRA, LoRA, Method
from benchmarks.shared.results import Record
from benchmarks.shared.summary import Summary, current, latest, summaries
from benchmarks.shared.sweep import Planned, Sweep
from benchmarks.shared.tables import table
from benchmarks.shared.task import Task

# What stands on the lines of the figure, by the names in the results; those of one word are runs of ``epochs.py``.
RANKS = {"lora r 1": 1, "lora r 2": 2, "lora r 4": 4, "lora": 8, "lora r 16": 16}
TOLERANCES = {"geolora tau 0.1": 0.1, "geolora tau 0.2": 0.2, "geolora": 0.3, "geolora tau 0.5": 0.5}
BUDGETS = {f"geolora budget {rank}": rank for rank in (1, 2, 4, 8)}  # ranks of LoRA with as many parameters
BESIDE_BUDGETS = 0.1  # the tolerance, which is so small that the budget decides
LINES = {"LoRA, rank": RANKS, "geolora_pl, tau": TOLERANCES, "geolora_pl, budget": BUDGETS}
POINTS = [point for line in LINES.values() for point in line]


def methods(rank_one: int) -> dict[str, Method]:
    """The methods by their names.

    Args:
        rank_one: Parameters of LoRA of rank 1.
    """
    budgets = {name: {"tau": BESIDE_BUDGETS, "budget": rank * rank_one} for name, rank in BUDGETS.items()}
    return {
        **{name: LoRA({"r": rank, "lora_alpha": rank}) for name, rank in RANKS.items()},
        **{name: GeoLoRA(callback={"tau": tau}) for name, tau in TOLERANCES.items()},
        **{name: GeoLoRA(callback=settings) for name, settings in budgets.items()},
    }


def rank_one(task: Task) -> int:
    """Parameters of LoRA of rank 1 in the layers that are adapted."""
    model = task.make_model(0)
    return sum(sum(model.get_submodule(name).weight.shape) for name in task.targets)


def run(runs: Sweep, names: Sequence[str]) -> list[Record]:
    """Make the runs of some tasks, with those of ``epochs.py`` that choose the learning rates."""
    records = []
    for name in names:
        usual = {r["method"]: r for r in epochs.run(runs, [name], ["lora", "geolora"])}
        records += runs.make(
            [
                Planned(name, usual[family]["steps"], point, method, usual[family]["lr"], seed, epochs.whole)
                for point, method in methods(rank_one(tasks.load(name, runs.glue))).items()
                for family in [point.partition(" ")[0]]
                for seed in epochs.SEEDS
            ]
        )
    return records


def finals(records: Sequence[Record]) -> list[Record]:
    """The runs that are reported: those of today's settings, on tasks on which every point was measured with these."""
    sizes = {r["task"]: r["parameters"] for r in records if RANKS.get(r["method"]) == 1}
    today = [r for task, size in sizes.items() for r in current(records, methods(size)) if r["task"] == task]
    found = epochs.finals(latest(today))
    measured = {(r["task"], r["method"]) for r in found}
    return [r for r in found if all((r["task"], point) in measured for point in POINTS)]


def header(records: Sequence[Record]) -> list[str]:
    """The columns of :func:`rows`: the tasks."""
    return ["method", *dict.fromkeys(r["task"] for r in records)]


def rows(records: Sequence[Record]) -> list[list[str]]:
    """One row per point: on each task the score with its standard error, and the adapter parameters.

    Args:
        records: From :func:`finals`.
    """
    found = summaries(records)

    def cell(run: Summary) -> str:
        return f"{epochs.with_error(list(run.scores.values()))} with {run.parameters:,.0f}"

    return [[point, *(cell(found[task, point]) for task in header(records)[1:])] for point in POINTS]


def draw(records: Sequence[Record]) -> None:
    """Draw the score over the parameters: one panel per task, means of the seeds with their standard errors."""
    found = summaries(records)
    drawn = list(dict.fromkeys(task for task, _ in found))
    figure, axes = figures.panels(len(drawn))
    for ax, task in zip(axes, drawn, strict=True):
        for line, names in LINES.items():
            runs = sorted((found[task, name] for name in names), key=lambda of_method: of_method.parameters)
            scores, errors = zip(*(epochs.mean_and_error(list(r.scores.values())) for r in runs), strict=True)
            ax.errorbar(
                [r.parameters for r in runs], scores, yerr=errors, marker="o", markersize=3, capsize=2, label=line
            )
        ax.set(title=task, xlabel="adapter parameters", xscale="log")
        ax.set_xticks([found[task, name].parameters for name in RANKS])
        ax.xaxis.set_major_formatter(EngFormatter(places=0, sep=""))
        ax.minorticks_off()
    axes[0].set_ylabel("score")
    axes[0].legend(fontsize="small")
    figures.save(figure, "pareto")


def main(arguments: Sequence[str] | None = None) -> None:
    args = sweep.parser_of_runs(__doc__, ["mrpc", "cola"], epochs.OUTPUT).parse_args(arguments)
    records = finals(run(sweep.sweep_of(Path(__file__), args), args.tasks))
    draw(records)
    Console().print(table(header(records), rows(records)))


if __name__ == "__main__":
    main()
