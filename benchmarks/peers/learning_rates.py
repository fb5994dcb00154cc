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
from benchmarks.shared import figures, sweep
from benchmarks.shared.results import Record
from benchmarks.shared.summary import alive
from benchmarks.shared.sweep import Sweep
from benchmarks.shared.tables import table

LABELS = {"geolora": "geolora_pl", "lora": "LoRA r 8", "adalora": "AdaLoRA"}  # of the methods, in the figure
HEADER = ("task", "method", "best lr", "score", "range of lr within .03")
Scores = dict[tuple[str, str], dict[float, float]]  # of a task and a method, by the learning rate
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


def run(runs: Sweep, names: Sequence[str]) -> Scores:
    """Make the runs that are missing, and return all scores of the tasks."""
    records: list[Record] = []
    for name in names:
        steps = epochs.steps_of(name, runs.glue)
        for method in LABELS:
            records += runs.make(epochs.choices(name, steps, method, lrs(name, method)))
    return scores(records)


def scores(records: Sequence[Record]) -> Scores:
    """The scores by the learning rate, of each task on which all rates of all methods were tried.

    Args:
        records: Runs of whole epochs and those by which their learning rates were chosen, of which these are taken.
    """
    found: Scores = {}
    for record in records:
        if (name := epochs.chosen_for(record["task"])) is not None:
            found.setdefault((name, record["method"]), {})[record["lr"]] = record["score"]
    names = dict.fromkeys(name for name, _ in found)
    whole = [name for name in names if all(set(lrs(name, m)) <= set(found.get((name, m), {})) for m in LABELS)]
    return {(name, m): {lr: found[name, m][lr] for lr in lrs(name, m)} for name in whole for m in LABELS}


def rows(found: Scores) -> list[list[str]]:
    """One row per task and method: the best learning rate, its score, and the range of those within .03 of it."""
    lines = []
    for (task, method), by_lr in found.items():
        best = max(by_lr, key=lambda lr: by_lr[lr])
        lines.append([task, LABELS[method], f"{best:g}", f"{by_lr[best]:.3f}", alive(by_lr)])
    return lines


def draw(found: Scores) -> None:
    """Draw the score over the learning rate, as a multiple of the usual best: one panel per task."""
    names = list(dict.fromkeys(task for task, _ in found))
    figure, axes = figures.panels(len(names))
    for ax, name in zip(axes, names, strict=True):
        for method, label in LABELS.items():
            rates, of_rates = zip(*found[name, method].items(), strict=True)
            ax.plot([lr / rates[_EACH_SIDE] for lr in rates], of_rates, marker="o", markersize=3, label=label)
        ax.set(title=name, xlabel="learning rate over the usual best", xscale="log")
    axes[0].set_ylabel("score")
    axes[0].legend(fontsize="small")
    figures.save(figure, "learning_rates")


def main(arguments: Sequence[str] | None = None) -> None:
    args = sweep.parser_of_runs(__doc__, ["mrpc", "rte", "rotated"], epochs.OUTPUT).parse_args(arguments)
    found = run(sweep.sweep_of(Path(__file__), args), args.tasks)
    draw(found)
    Console().print(table(HEADER, rows(found)))


if __name__ == "__main__":
    main()
