"""The part of a report about classes: which was taken for which, and a score for each."""

from __future__ import annotations

import math

from geolora_pl.report import html
from geolora_pl.report.confusion import Confusion

_SMALL = 12  # classes whose matrix is shown at once
_LEVELS = 9  # colours


def classes(found: Confusion) -> str:
    """The confusion matrix with scores by class; that of many classes in a fold, below their scores.

    Args:
        found: What was counted.
    """
    where = f"validation at step {found.step:,}"
    names, indices = list(found.names), range(len(found.names))
    scores = [[_share(found.recall(i)), _share(found.precision(i))] for i in indices]
    counts = [[f"{count:,}" if count else "" for count in of_class] for of_class in found.counts]
    marks = {
        (i, j): f"r{min(_LEVELS - 1, math.ceil(_LEVELS * count / sum(of_class)) - 1)}"
        for i, of_class in enumerate(found.counts)
        for j, count in enumerate(of_class)
        if count
    }
    caption = f"Each class (rows) and what it was taken for (columns), {where}"
    if len(names) <= _SMALL:
        rows = [[names[i], *counts[i], *scores[i]] for i in indices]
        return html.table(["class", *names, "recall", "precision"], rows, caption, marks)
    rows = [[names[i], f"{sum(found.counts[i]):,}", *scores[i], _mistaken(found, i)] for i in indices]
    scored = html.table(["class", "samples", "recall", "precision", "most mistaken for"], rows, f"Classes, {where}")
    matrix = [[names[i], *counts[i]] for i in indices]
    return scored + html.fold("The confusion matrix", html.table(["class", *names], matrix, caption, marks))


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _mistaken(found: Confusion, index: int) -> str:
    others = {other: count for other, count in enumerate(found.counts[index]) if other != index and count}
    if not others:
        return ""
    most = max(others, key=lambda other: others[other])
    return f"{found.names[most]} ({others[most]:,})"
