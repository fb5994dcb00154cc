"""What the runs of ``compare.py`` say, as numbers and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from rich.table import Table

NONE = "-"
ALIVE = 0.03  # how far below its best score a learning rate may be

Records = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Summary:
    """A method on a task.

    Attributes:
        lr: The best learning rate.
        scores: At it, by seed.
        parameters: Active adapter parameters at it, the mean over the seeds.
        alive: Largest by smallest learning rate around the best whose score of the sweep is within ``ALIVE`` of it.
        curve: ``[step, seconds, score]`` on the way, means over the seeds.
    """

    lr: float
    scores: dict[int, float]
    parameters: float
    alive: str
    curve: list[list[float]]


def best_lr(records: Iterable[dict[str, Any]]) -> float:
    """The learning rate of the best score in the sweep, which has seed 0."""
    best: float = max((r for r in records if r["seed"] == 0), key=lambda r: r["score"])["lr"]
    return best


def summary(records: Records) -> Summary:
    """Summarise the runs of one method on one task."""
    lr = best_lr(records)
    runs = [r for r in records if r["lr"] == lr]
    sweep = {r["lr"]: r["score"] for r in records if r["seed"] == 0}
    whole = [r["scores"] for r in runs if len(r["scores"]) == max(len(r["scores"]) for r in runs)]
    return Summary(
        lr=lr,
        scores={r["seed"]: r["score"] for r in runs},
        parameters=mean(r["parameters"] for r in runs),
        alive=alive(sweep),
        curve=[[mean(values) for values in zip(*points, strict=True)] for points in zip(*whole, strict=True)],
    )


def alive(sweep: dict[float, float]) -> str:
    """Largest by smallest learning rate around the best whose score is within ``ALIVE`` of it, without a gap.

    Returns:
        The ratio, as a bound where these reach the edge of the sweep.

    Example:
        >>> alive({0.001: 0.88, 0.01: 0.9, 0.1: 0.2, 1.0: 0.9}), alive({0.1: 0.2, 1.0: 0.9, 10.0: 0.1})
        ('≥ 10', '1')
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
    return f"{'≥ ' if at_edge else ''}{rates[high] / rates[low]:.3g}"


def reach(curve: list[list[float]], score: float) -> tuple[float, float] | None:
    """Steps and seconds at which a curve first reaches a score, between two points on the straight line.

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


def latest(records: Records) -> Records:
    """Of each method on each task the runs that were made as its last one was."""

    def how(record: dict[str, Any]) -> tuple[Any, ...]:
        return record["settings"], record["steps"], record["warmup"]

    last = {(r["task"], r["method"]): how(r) for r in records}
    return [r for r in records if last[r["task"], r["method"]] == how(r)]


def summaries(records: Records) -> dict[tuple[str, str], Summary]:
    """The summary of every task and method."""
    pairs = dict.fromkeys((r["task"], r["method"]) for r in records)
    return {pair: summary([r for r in records if (r["task"], r["method"]) == pair]) for pair in pairs}


def table(records: Records) -> Table:
    """A row a method: its score on each task, their mean, and what it took."""
    view = Table(*header(records))
    for row in rows(records):
        view.add_row(*row)
    return view


def header(records: Records) -> list[str]:
    names = dict.fromkeys(r["task"] for r in records)
    return ["method", *names, "mean", "parameters", "lr range", "steps to LoRA", "seconds to LoRA"]


def rows(records: Records) -> list[list[str]]:
    """The cells of the table.

    Of every task there are, one after the other: active parameters, the range of learning rates, and the steps and
    seconds to the score that LoRA ends with, as parts of what LoRA took in all.
    """
    found = summaries(records)
    names = list(dict.fromkeys(r["task"] for r in records))
    lines = []
    for method in dict.fromkeys(r["method"] for r in records):
        of_method = [found.get((name, method)) for name in names]
        there = [s for s in of_method if s is not None]
        cells = [method, *(spread(s.scores.values()) if s else NONE for s in of_method)]
        seeds = set.intersection(*(set(s.scores) for s in there))
        means = [mean(s.scores[seed] for s in there) for seed in sorted(seeds)]
        cells.append(spread(means) if len(there) == len(names) else NONE)
        cells.append(" / ".join(f"{s.parameters:,.0f}" if s else NONE for s in of_method))
        cells.append(" / ".join(s.alive if s else NONE for s in of_method))
        for axis in (0, 1):
            parts = [
                _part_of_lora(s, found.get((name, "lora")), axis) for name, s in zip(names, of_method, strict=True)
            ]
            cells.append(" / ".join(parts))
        lines.append(cells)
    return lines


def overview(records: Records, tasks: Sequence[str]) -> list[list[str]]:
    """A row for each method that ran on all of some tasks: scores, their mean, parameters beside those of LoRA."""
    found = summaries(records)
    lines = []
    for method in dict.fromkeys(r["method"] for r in records):
        if any((name, method) not in found for name in tasks):
            continue
        of_method = [found[name, method] for name in tasks]
        seeds = set.intersection(*(set(s.scores) for s in of_method))
        parts = [s.parameters / found[name, "lora"].parameters for name, s in zip(tasks, of_method, strict=True)]
        least, most = (f"{100 * part:,.0f}" for part in (min(parts), max(parts)))
        lines.append(
            [
                method,
                *(spread(s.scores.values()) for s in of_method),
                spread(mean(s.scores[seed] for s in of_method) for seed in sorted(seeds)),
                f"{least}%" if least == most else f"{least}% to {most}%",
            ]
        )
    return lines


def _part_of_lora(method: Summary | None, lora: Summary | None, axis: int) -> str:
    """When the score is reached that LoRA ends with, in steps (axis 0) or seconds (1), as a part of LoRA's run."""
    if method is None or lora is None or not lora.curve:
        return NONE
    end = lora.curve[-1]
    at = reach(method.curve, end[2])
    return f"{at[axis] / end[axis]:.2f}" if at else "never"


def spread(values: Iterable[float]) -> str:
    """Mean and standard deviation."""
    scores = list(values)
    return f"{mean(scores):.3f}" + (f" ± {stdev(scores):.3f}" if len(scores) > 1 else "")
