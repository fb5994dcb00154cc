"""Which way a score is better, by what the run said of it, or by its name."""

from __future__ import annotations

import re
from collections.abc import Callable

from geolora_pl.report.record import BETTER, Record
from geolora_pl.report.runs import Curve

_SPLITS = ("train", "val", "valid", "validation", "test")
_LOWER = {"loss", "error", "perplexity", "mse", "rmse", "mae", "wer", "cer"}
_HIGHER = {"accuracy", "acc", "f1", "matthews", "pearson", "spearman", "precision", "recall", "auroc", "similarity"}
_HIGHER |= {"exact", "bleu", "rouge", "rouge1", "rouge2", "rougel", "iou", "map", "r2"}


def split_of(name: str) -> str:
    """The split by which a metric begins; empty if by none.

    Example:
        >>> split_of("val_loss"), split_of("validity")
        ('val', '')
    """
    first = re.split("[_/]", name)[0]
    return first if first in _SPLITS else ""


def is_of_validation(name: str) -> bool:
    """Whether a metric is of a validation."""
    return split_of(name) in ("val", "valid", "validation")


def best(name: str, curve: Curve, record: Record) -> tuple[int, float] | None:
    """The step and the value at which a score was best; ``None`` if nobody knows which way that is.

    Args:
        name: The metric.
        curve: Its values over steps.
        record: What the run said of itself.

    Example:
        >>> best("val_f1", [(1, 0.5), (2, 0.7), (3, 0.6)], {})
        (2, 0.7)
    """
    words = set(re.split("[_/]", name.lower()))
    mode = record.get(BETTER + name) or ("min" if words & _LOWER else "max" if words & _HIGHER else None)
    extreme: Callable[..., tuple[int, float]] | None = {"min": min, "max": max}.get(str(mode))
    return extreme(curve, key=lambda point: point[1]) if extreme else None
