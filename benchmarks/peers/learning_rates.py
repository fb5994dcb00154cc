"""Scores over a factor of 1,000 in the learning rate: this package, LoRA and AdaLoRA around the usual best of each.

    python benchmarks/peers/learning_rates.py

Runs are those by which ``epochs.py`` chooses a learning rate: a third of the steps, judged by a part of the training
set. They lie in its file, and the figure is ``docs/figures/learning_rates.svg``.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is found from where this script lies

from collections.abc import Sequence

from rich.console import Console

from benchmarks.peers import epochs
from benchmarks.shared import figures
from benchmarks.shared.results import Record
from benchmarks.shared.summary import alive
from benchmarks.shared.sweep import Sweep
from benchmarks.shared.tables import table

METHODS = {"geolora": "geolora_pl", "lora": "LoRA r 8", "adalora": "AdaLoRA"}  # with their names in the figure
_LADDER = [float(f"{digit}e{power}") for power in range(-6, 3) for digit in (1, 3)]
_EACH_SIDE = 3  # rates below and above the usual best


def lrs(name: str, method: str) -> list[float]:
    """Learning rates of a method on a task around the usual best, in factors of about 3.

    Example:
        >>> lrs("mrpc", "lora")
        [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1]
    """
    middle = _LADDER.index(epochs.usual_lrs(name)[method][1])
    return _LADDER[middle - _EACH_SIDE : middle + _EACH_SIDE + 1]


def run(runs: Sweep, names: Sequence[str]) -> dict[tuple[str, str], dict[float, float]]:
    """The scores by the learning rate, of each task and method."""
    found = {}
    for name in names:
        steps = epochs.steps_of(name, runs.glue)
        for method in METHODS:
            records: list[Record] = runs.make(epochs.choices(name, steps, method, lrs(name, method)))
            found[name, method] = {record["lr"]: record["score"] for record in records}
    return found


def rows(found: dict[tuple[str, str], dict[float, float]]) -> list[list[str]]:
    """One row per task and method: the best learning rate, its score, and the range of those within .03 of it."""
    return [
        [
            task,
            METHODS[method],
            f"{max(scores, key=scores.__getitem__):g}",
            f"{max(scores.values()):.3f}",
            alive(scores),
        ]
        for (task, method), scores in found.items()
    ]


def draw(found: dict[tuple[str, str], dict[float, float]]) -> None:
    """Draw the score over the learning rate, as a multiple of the usual best: one panel per task."""
    names = list(dict.fromkeys(task for task, _ in found))
    figure, axes = figures.panels(len(names))
    for ax, name in zip(axes, names, strict=True):
        for method, label in METHODS.items():
            rates, scores = zip(*found[name, method].items(), strict=True)
            usual = rates[_EACH_SIDE]
            ax.plot([lr / usual for lr in rates], scores, marker="o", markersize=3, label=label)
        ax.set(title=name, xlabel="learning rate over the usual best", xscale="log")
    axes[0].set_ylabel("score")
    axes[0].legend(fontsize="small")
    figures.save(figure, "learning_rates")


def main(arguments: Sequence[str] | None = None) -> None:
    args = epochs.make_parser(__doc__, ["mrpc", "rte", "rotated"]).parse_args(arguments)
    found = run(epochs.sweep_of(Path(__file__), args), args.tasks)
    draw(found)
    Console().print(table(["task", "method", "best lr", "score", "range of lr within .03"], rows(found)))


if __name__ == "__main__":
    main()
