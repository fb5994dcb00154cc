"""The comparison of the methods as a table."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from rich.table import Table
from scipy.stats import ttest_1samp

from benchmarks.shared import tables
from benchmarks.shared.summary import Records, Summary, reach, spread, summaries

NONE = "-"
COSTS = ("method", "steps to LoRA", "parameters there", "seconds over LoRA's")  # the columns of ``costs``


def table(records: Records) -> Table:
    """One row per method, with its score on each task, their mean, and what these took."""
    return tables.table(header(records), rows(records))


def header(records: Records) -> list[str]:
    """Names of the columns of :func:`rows`."""
    names = dict.fromkeys(r["task"] for r in records)
    return ["method", *names, "mean", "parameters", "lr range", "steps to LoRA", "seconds to LoRA"]


def rows(records: Records) -> list[list[str]]:
    """The cells of the table, one row per method.

    The last four columns have one number per task: the active parameters, the range of learning rates that work, and
    the steps and seconds until the score that LoRA ends with is reached, as parts of LoRA's whole run.
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
    """One row per method that ran on all of the tasks: scores, their mean, and parameters relative to LoRA's."""
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


def paired(records: Records, tasks: Sequence[str]) -> list[list[str]]:
    """One row per method: the differences of its scores to LoRA's with the same seed, and their 95% intervals.

    The last column has the mean over all tasks, for methods that ran on all of them. Its interval takes the mean
    difference of each task as one observation: seeds of one task are no independent observations of other tasks, and
    tasks spread so differently that all pairs together would seem more certain than they are.
    """
    found = summaries(records)
    lines = []
    for method in dict.fromkeys(r["method"] for r in records):
        pairs = [_differences(found.get((name, method)), found.get((name, "lora"))) for name in tasks]
        if method != "lora" and any(pairs):
            cells = [_interval(of_task) if of_task else NONE for of_task in pairs]
            lines.append([method, *cells, _interval([mean(of_task) for of_task in pairs]) if all(pairs) else NONE])
    return lines


def costs(records: Records) -> list[list[str]]:
    """One row per method: when it reaches LoRA's last score, with how many parameters, and what its steps cost.

    Each cell has one number per task, as those of :func:`rows`.
    """
    found = summaries(records)
    names = list(dict.fromkeys(r["task"] for r in records))
    lines = []
    for method in dict.fromkeys(r["method"] for r in records):
        of_tasks = [_cost(found.get((name, method)), found.get((name, "lora"))) for name in names]
        lines.append([method, *(" / ".join(column) for column in zip(*of_tasks, strict=True))])
    return lines


def _cost(method: Summary | None, lora: Summary | None) -> tuple[str, str, str]:
    """The part of LoRA's steps until its last score, the parameters there, and the seconds of all steps over LoRA's.

    The parameters are those of the last step before it that has them.
    """
    if method is None or lora is None or not method.curve or not lora.curve:
        return NONE, NONE, NONE
    at = reach(method.curve, lora.curve[-1][2])
    there = f"{[size for step, size in method.sizes if step <= at[0]][-1]:,.0f}" if at else "never"
    return _part_of_lora(method, lora, axis=0), there, f"{method.curve[-1][1] / lora.curve[-1][1]:.2f}"


def _differences(method: Summary | None, lora: Summary | None) -> list[float]:
    """What a method scores more than LoRA with the same seed, for each seed of both."""
    if method is None or lora is None:
        return []
    return [score - lora.scores[seed] for seed, score in sorted(method.scores.items()) if seed in lora.scores]


def _interval(differences: Sequence[float]) -> str:
    """The mean, and the interval of 95% of Student's t, as a cell; without an interval if there is but one."""
    if len(differences) < 2:
        return f"{mean(differences):+.3f}"
    low, high = ttest_1samp(differences, 0.0).confidence_interval(0.95)
    return f"{mean(differences):+.3f} ({low:+.3f} to {high:+.3f})"


def _part_of_lora(method: Summary | None, lora: Summary | None, axis: int) -> str:
    """When a method reaches LoRA's last score, in steps (axis 0) or seconds (axis 1), as a part of LoRA's run."""
    if method is None or lora is None or not lora.curve:
        return NONE
    end = lora.curve[-1]
    at = reach(method.curve, end[2])
    return f"{at[axis] / end[axis]:.2f}" if at else "never"
