"""Make the metrics of text classification and regression by the names under which they are logged."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from torch import nn
from torchmetrics import Metric, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)

# Each of these is made for a given number of classes.
_OF_CLASSES: dict[str, Callable[[int], Metric]] = {
    "accuracy": lambda classes: MulticlassAccuracy(classes, average="micro"),
    "f1": lambda classes: BinaryF1Score() if classes == 2 else MulticlassF1Score(classes, average="macro"),
    "matthews": MulticlassMatthewsCorrCoef,
}
_OF_NUMBERS: dict[str, Callable[[], Metric]] = {"pearson": PearsonCorrCoef, "spearman": SpearmanCorrCoef}
METRICS = (*_OF_CLASSES, *_OF_NUMBERS)


def usual_metrics(num_classes: int) -> list[str]:
    """Return the default metrics: accuracy, or both correlations for a regression (one class)."""
    return list(_OF_NUMBERS) if num_classes == 1 else ["accuracy"]


def make_metrics(names: Sequence[str], num_classes: int) -> nn.ModuleDict:
    """Make metrics of class indices, or of numbers for a regression.

    Args:
        names: Names among ``accuracy``, ``f1`` (of class 1 if there are two classes, otherwise the mean over the
            classes), ``matthews``, ``pearson`` and ``spearman``.
        num_classes: Number of classes, or 1 for a regression.

    Raises:
        ValueError: A metric does not suit the number of classes.

    Example:
        >>> list(make_metrics(["f1", "accuracy"], 2))
        ['f1', 'accuracy']
    """
    suited = _OF_NUMBERS if num_classes == 1 else _OF_CLASSES
    for name in names:
        if name not in suited:
            kind = "a regression" if num_classes == 1 else f"{num_classes} classes"
            raise ValueError(f"metrics={name!r} does not suit {kind}: choose among {', '.join(suited)}")
    if num_classes > 1:
        return nn.ModuleDict({name: _OF_CLASSES[name](num_classes) for name in names})
    with warnings.catch_warnings():  # Spearman's metric warns that it keeps all predictions, which it must
        warnings.filterwarnings("ignore", message="Metric `SpearmanCorrcoef`")
        return nn.ModuleDict({name: _OF_NUMBERS[name]() for name in names})
