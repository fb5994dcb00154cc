"""Scores against parameters: LoRA at five ranks beside this package at four tolerances and at four budgets.

    python benchmarks/peers/pareto.py
    python benchmarks/peers/pareto.py --tasks rotated

Runs are those of ``epochs.py``: whole epochs, its seeds, and the learning rates that it chooses for LoRA and for this
package. They lie in its file, and the figure is ``docs/figures/pareto.svg``.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is found from where this script lies

from collections.abc import Mapping, Sequence
from statistics import mean

from rich.console import Console

from benchmarks.peers import epochs
from benchmarks.shared import figures, tasks
from benchmarks.shared.methods import METHODS, GeoLoRA, LoRA, Method
from benchmarks.shared.results import Record
from benchmarks.shared.sweep import Planned, Sweep
from benchmarks.shared.tables import table
from benchmarks.shared.task import Task

RANKS = (1, 2, 4, 8, 16)
TOLERANCES = (0.1, 0.2, 0.3, 0.5)
BUDGETS = (1, 2, 4, 8)  # ranks of LoRA with as many parameters
BESIDE_BUDGETS = 0.1  # the tolerance, which is so small that the budget decides
HEADER = ("task", "method", "score", "adapter parameters")


def curves(rank_one: int) -> dict[str, dict[str, Method]]:
    """The lines of the figure, with the methods on them by their names in the results.

    Args:
        rank_one: Parameters of LoRA of rank 1.
    """
    tolerances = {f"geolora tau {tau}": GeoLoRA(callback={"tau": tau}) for tau in TOLERANCES}
    budgets = {
        f"geolora budget {rank}": GeoLoRA(callback={"tau": BESIDE_BUDGETS, "budget": rank * rank_one})
        for rank in BUDGETS
    }
    ranks = {f"lora r {rank}": LoRA({"r": rank, "lora_alpha": rank}) for rank in RANKS}
    return {
        line: {_usual_name(method) or name: method for name, method in points.items()}
        for line, points in {"LoRA, rank": ranks, "geolora_pl, tau": tolerances, "geolora_pl, budget": budgets}.items()
    }


def _usual_name(method: Method) -> str | None:
    """The name of a method whose runs ``epochs.py`` makes."""
    return next((name for name in ("lora", "geolora") if METHODS[name].settings() == method.settings()), None)


def rank_one(task: Task) -> int:
    """Parameters of LoRA of rank 1 in the layers that are adapted."""
    model = task.make_model(0)
    return sum(sum(model.get_submodule(name).weight.shape) for name in task.targets)


def run(runs: Sweep, names: Sequence[str]) -> list[Record]:
    """Make the runs of some tasks, with those of ``epochs.py`` that choose the learning rates."""
    records = []
    for name in names:
        usual = {r["method"]: r for r in epochs.run(runs, [name], ["lora", "geolora"])}
        methods = {k: v for points in curves(rank_one(tasks.load(name, runs.glue))).values() for k, v in points.items()}
        records += runs.make(
            [
                Planned(name, usual[family]["steps"], point, method, usual[family]["lr"], seed, epochs.whole)
                for point, method in methods.items()
                for family in [point.partition(" ")[0]]
                for seed in epochs.SEEDS
            ]
        )
    return records


def rows(records: Sequence[Record]) -> list[list[str]]:
    """One row per task and method."""
    return [
        [task, method, epochs.with_error([r["score"] for r in runs]), f"{mean(r['parameters'] for r in runs):,.0f}"]
        for task, of_task in _by("task", records).items()
        for method, runs in _by("method", of_task).items()
    ]


def draw(records: Sequence[Record], lines: Mapping[str, Mapping[str, Method]]) -> None:
    """Draw the score over the parameters: one panel per task, means of the seeds with their standard errors.

    Args:
        records: The runs.
        lines: Names of the methods on each line.
    """
    by_task = _by("task", records)
    figure, axes = figures.panels(len(by_task))
    for ax, (task, of_task) in zip(axes, by_task.items(), strict=True):
        runs = _by("method", of_task)
        for line, names in lines.items():
            points = sorted(
                (mean(r["parameters"] for r in runs[name]), *epochs.mean_and_error([r["score"] for r in runs[name]]))
                for name in names
                if name in runs
            )
            if points:
                ax.errorbar(*zip(*((x, y) for x, y, _ in points), strict=True), yerr=[e for *_, e in points],
                            marker="o", markersize=3, capsize=2, label=line)  # fmt: skip
        ax.set(title=task, xlabel="adapter parameters", xscale="log")
    axes[0].set_ylabel("score")
    axes[0].legend(fontsize="small")
    figures.save(figure, "pareto")


def _by(key: str, records: Sequence[Record]) -> dict[str, list[Record]]:
    return {value: [r for r in records if r[key] == value] for value in dict.fromkeys(r[key] for r in records)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = epochs.make_parser(__doc__, ["mrpc", "cola"])
    args = parser.parse_args(arguments)
    records = run(epochs.sweep_of(Path(__file__), args), args.tasks)
    draw(records, curves(1))
    Console().print(table(HEADER, rows(records)))


if __name__ == "__main__":
    main()
