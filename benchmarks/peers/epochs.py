"""Whole epochs: learning rates chosen on a part cut from the training set, scores on the official dev or test sets.

    python benchmarks/peers/epochs.py
    python benchmarks/peers/epochs.py --tasks mrpc held_out --methods geolora lora full --jobs 1

Three learning rates per method, in factors of 3 around its usual best, are tried with seed 0 for a third of the steps,
with a tenth of the training set to judge them by. The best one is repeated with seeds 11, 12 and 13, which nothing was
chosen with, on the whole training set. Results are appended to ``benchmarks/results/epochs.jsonl``, one line per run;
a run that is there already is not repeated.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is found from where this script lies

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import sqrt
from statistics import mean, stdev

from rich.console import Console

from benchmarks.peers import comparison
from benchmarks.shared import forgetting, sweep, tasks
from benchmarks.shared.methods import METHODS
from benchmarks.shared.paths import RESULTS
from benchmarks.shared.results import Record
from benchmarks.shared.summary import best_lr, summaries
from benchmarks.shared.sweep import Planned, Sweep
from benchmarks.shared.tables import table
from benchmarks.shared.task import Task, held_back

EPOCHS = {"mrpc": 3, "rte": 5, "cola": 3, "held_out": 30, "rotated": 30, "stsb": 3, "sst2": 1, "digits": 30}
CHOSEN_BY = ("stsb", "sst2", "digits")  # tasks by which this package's defaults were chosen
SEEDS = (11, 12, 13)
OUTPUT = RESULTS / "epochs.jsonl"
LRS: dict[str, tuple[float, ...]] = {
    "geolora": (0.1, 0.3, 1.0),
    "lora": (1e-3, 3e-3, 1e-2),
    "rslora": (3e-4, 1e-3, 3e-3),
    "pissa": (3e-4, 1e-3, 3e-3),
    "dora": (1e-3, 3e-3, 1e-2),
    "adalora": (3e-3, 1e-2, 3e-2),
    "riemannian": (1e-3, 3e-3, 1e-2),
    "full": (3e-5, 1e-4, 3e-4),
    "head": (3e-3, 1e-2, 3e-2),
}
# Where the usual best is another one: the small ViT takes larger steps than MiniLM.
LRS_OF_IMAGES: dict[str, tuple[float, ...]] = {
    **LRS,
    "lora": (3e-3, 1e-2, 3e-2),
    "rslora": (1e-3, 3e-3, 1e-2),
    "pissa": (1e-3, 3e-3, 1e-2),
    "dora": (3e-3, 1e-2, 3e-2),
    "full": (3e-4, 1e-3, 3e-3),
    "head": (1e-1, 3e-1, 1.0),
}
_CUT = " (a tenth of its training set held back)"


def whole(name: str, glue: Path) -> Task:
    """A task, which also tells what its model forgets, if that is one of language."""
    task = tasks.load(name, glue)
    return task if name in tasks.IMAGE_TASKS else replace(task, probe=partial(forgetting.similarity, glue=glue))


def cut(name: str, glue: Path) -> Task:
    """A task that is judged by a tenth of its training set."""
    return held_back(tasks.load(name.removesuffix(_CUT), glue))


def chosen_for(name: str) -> str | None:
    """The task whose learning rates are chosen by the runs of this name, or ``None`` for runs that choose none."""
    return name.removesuffix(_CUT) if name.endswith(_CUT) else None


def steps_of(name: str, glue: Path) -> int:
    """Steps of the whole epochs of a task."""
    task = tasks.load(name, glue)
    return EPOCHS[name] * (task.train.size // task.batch_size)


def usual_lrs(name: str) -> dict[str, tuple[float, ...]]:
    """The learning rates of each method that are tried on a task."""
    return LRS_OF_IMAGES if name in tasks.IMAGE_TASKS else LRS


def choices(name: str, steps: int, method: str, lrs: Sequence[float]) -> list[Planned]:
    """The runs by which one of several learning rates is chosen.

    Args:
        name: The task.
        steps: Steps of its whole epochs, of which these runs take a third.
        method: The method.
        lrs: Its learning rates.
    """
    return [Planned(name + _CUT, steps // 3, method, METHODS[method], lr, 0, cut) for lr in lrs]


def run(runs: Sweep, names: Sequence[str], methods: Sequence[str]) -> list[Record]:
    """Choose the learning rates, and make the runs with them; one pair of a task and a method after the other.

    Args:
        runs: Makes the runs.
        names: The tasks.
        methods: The methods.
    """
    found = []
    for name in names:
        steps = steps_of(name, runs.glue)
        for method in methods:
            lr = best_lr(runs.make(choices(name, steps, method, usual_lrs(name)[method])))
            found += runs.make([Planned(name, steps, method, METHODS[method], lr, seed, whole) for seed in SEEDS])
    return found


def finals(records: Sequence[Record]) -> list[Record]:
    """The runs that are reported: those with the learning rate that was chosen last for their task and method."""
    reported = [record for record in records if record["seed"] in SEEDS]
    last = {(record["task"], record["method"]): record["lr"] for record in reported}
    return [record for record in reported if record["lr"] == last[record["task"], record["method"]]]


def rows(records: Sequence[Record]) -> list[list[str]]:
    """One row per method: scores with their standard errors, parameters, and what is left of a skill not trained.

    The mean is over the tasks that did not choose this package's defaults, of the methods that ran on all of them with
    the same seeds.

    Args:
        records: From :func:`finals`.
    """
    found = summaries(records)
    names = list(dict.fromkeys(r["task"] for r in records))
    lines = []
    for method in dict.fromkeys(r["method"] for r in records):
        of_tasks = [found.get((name, method)) for name in names]
        cells = [method, *(with_error(list(s.scores.values()) if s else []) for s in of_tasks)]
        fresh = [s.scores if s else {} for name, s in zip(names, of_tasks, strict=True) if name not in CHOSEN_BY]
        seeds = sorted(fresh[0]) if len({frozenset(scores) for scores in fresh}) == 1 else []
        cells.append(with_error([mean(scores[seed] for scores in fresh) for seed in seeds]))
        cells.append(" / ".join(f"{s.parameters:,.0f}" if s else comparison.NONE for s in of_tasks))
        cells.append(" / ".join(f"{s.lr:g}" if s else comparison.NONE for s in of_tasks))
        left = [[r["zero_shot"] for r in runs if r["method"] == method] for runs in _left(records).values()]
        cells.append(" / ".join(with_error(values) for values in left))
        lines.append(cells)
    return lines


def _left(records: Sequence[Record]) -> dict[str, list[Record]]:
    """By task, the runs after which it was measured what is left of STS-B, which they did not train."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if "zero_shot" in record and record["task"] != "stsb":
            found.setdefault(record["task"], []).append(record)
    return found


def header(records: Sequence[Record]) -> list[str]:
    """Names of the columns of :func:`rows`; a star marks the tasks by which this package's defaults were chosen."""
    names = dict.fromkeys(r["task"] for r in records)
    marked = [f"{name}*" if name in CHOSEN_BY else name for name in names]
    over = "mean without *" if any(name in CHOSEN_BY for name in names) else "mean"
    return ["method", *marked, over, "parameters", "lr", f"STS-B after {' / '.join(_left(records))}"]


def mean_and_error(scores: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, which is 0 for a single score."""
    return mean(scores), stdev(scores) / sqrt(len(scores)) if len(scores) > 1 else 0.0


def with_error(scores: Sequence[float]) -> str:
    """Mean and standard error, as a cell of a table."""
    if not scores:
        return comparison.NONE
    middle, error = mean_and_error(scores)
    return f"{middle:.3f}" + (f" ± {error:.3f}" if len(scores) > 1 else "")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = sweep.parser_of_runs(__doc__, list(EPOCHS), OUTPUT)
    parser.add_argument("--methods", nargs="+", choices=LRS, default=list(LRS))
    args = parser.parse_args(arguments)
    records = finals(run(sweep.sweep_of(Path(__file__), args), args.tasks, args.methods))
    for columns, lines in (
        (header(records), rows(records)),
        (["method", *args.tasks, "all"], comparison.paired(records, args.tasks)),
    ):
        Console().print(table(columns, lines))


if __name__ == "__main__":
    main()
