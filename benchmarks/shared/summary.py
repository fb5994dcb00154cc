"""What a set of runs says: best learning rates, scores with their spread, and how they were reached."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from benchmarks.shared.methods import Method
from benchmarks.shared.results import Record

ALIVE = 0.03  # a learning rate whose score is less than this below the best one still works

Records = Sequence[Record]


@dataclass(frozen=True)
class Summary:
    """One method on one task.

    Attributes:
        lr: The best learning rate.
        scores: Scores at the best learning rate, by seed.
        parameters: Active adapter parameters at the best learning rate, averaged over the seeds.
        alive: Range of the learning rates that work, from :func:`alive`.
        curve: Points ``[step, seconds, score]`` of the runs at the best learning rate, averaged over the seeds.
        sizes: Points ``[step, adapter parameters]`` of the same runs, averaged over the seeds.
    """

    lr: float
    scores: dict[int, float]
    parameters: float
    alive: str
    curve: list[list[float]]
    sizes: list[list[float]]


def best_lr(records: Iterable[Record]) -> float:
    """The learning rate of the best score in the sweep of learning rates, which has seed 0, or the only one."""
    all_runs = list(records)
    swept = [r for r in all_runs if r["seed"] == 0]
    if not swept and len({r["lr"] for r in all_runs}) > 1:
        raise ValueError("no run has seed 0, so the learning rate cannot be chosen")
    best: float = max(swept or all_runs, key=lambda r: r["score"])["lr"]
    return best


def summary(records: Records) -> Summary:
    """Summarise the runs of one method on one task."""
    lr = best_lr(records)
    runs = [r for r in records if r["lr"] == lr]
    sweep = {r["lr"]: r["score"] for r in records if r["seed"] == 0} or {lr: 0.0}
    whole = [r for r in runs if len(r["scores"]) == max(len(r["scores"]) for r in runs)]
    return Summary(
        lr=lr,
        scores={r["seed"]: r["score"] for r in runs},
        parameters=mean(r["parameters"] for r in runs),
        alive=alive(sweep),
        curve=_means([r["scores"] for r in whole]),
        sizes=_means([r["sizes"] for r in whole]),
    )


def _means(curves: Sequence[list[list[float]]]) -> list[list[float]]:
    """Point by point the mean of curves that have points at the same steps."""
    return [[mean(values) for values in zip(*points, strict=True)] for points in zip(*curves, strict=True)]


def alive(sweep: dict[float, float]) -> str:
    """How wide the range of learning rates around the best one is whose scores are within ``ALIVE`` of the best.

    Returns:
        The largest of them over the smallest, as a lower bound where they reach an edge of the sweep.

    Example:
        >>> alive({0.001: 0.88, 0.01: 0.9, 0.1: 0.2, 1.0: 0.9}), alive({0.01: 0.89, 10.0: 0.9})
        ('≥ 10', '≥ 1000')
    """
    rates = sorted(sweep)
    best = max(rates, key=lambda lr: sweep[lr])
    good = [sweep[lr] >= sweep[best] - ALIVE for lr in rates]
    low = high = rates.index(best)
    while low > 0 and good[low - 1]:
        low -= 1
    while high + 1 < len(rates) and good[high + 1]:
        high += 1
    at_edge = low == 0 or high == len(rates) - 1
    width = float(f"{rates[high] / rates[low]:.3g}")
    return f"{'≥ ' if at_edge else ''}{width:g}"


def reach(curve: list[list[float]], score: float) -> tuple[float, float] | None:
    """Steps and seconds at which a curve first reaches a score, by linear interpolation between its points.

    Example:
        >>> reach([[10, 1.0, 0.5], [20, 2.0, 0.7]], 0.6)
        (15.0, 1.5)
    """
    before: list[float] | None = None
    for point in curve:
        if point[2] >= score:
            if before is None:
                return point[0], point[1]
            part = (score - before[2]) / (point[2] - before[2])
            return before[0] + part * (point[0] - before[0]), before[1] + part * (point[1] - before[1])
        before = point
    return None


def current(records: Records, methods: Mapping[str, Method]) -> list[Record]:
    """The runs of some methods that were made with the settings that these have today.

    Args:
        records: Runs as they are read from a file.
        methods: The methods by their names in the records.
    """
    today = {name: json.loads(json.dumps(method.settings())) for name, method in methods.items()}
    return [r for r in records if r["method"] in today and r["settings"] == today[r["method"]]]


def latest(records: Records) -> Records:
    """The runs of each method on each task that have the settings of its last run."""

    def how(record: Record) -> tuple[Any, ...]:
        return record["settings"], record["steps"], record["warmup"]

    last = {(r["task"], r["method"]): how(r) for r in records}
    return [r for r in records if last[r["task"], r["method"]] == how(r)]


def summaries(records: Records) -> dict[tuple[str, str], Summary]:
    """A summary for every pair of a task and a method."""
    pairs = dict.fromkeys((r["task"], r["method"]) for r in records)
    return {pair: summary([r for r in records if (r["task"], r["method"]) == pair]) for pair in pairs}


def spread(values: Iterable[float]) -> str:
    """Mean and standard deviation, as a cell of a table."""
    scores = list(values)
    return f"{mean(scores):.3f}" + (f" ± {stdev(scores):.3f}" if len(scores) > 1 else "")
