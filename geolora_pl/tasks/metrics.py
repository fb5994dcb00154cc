"""Means of losses, and the metrics of classes, several labels and numbers by the names under which they are logged."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from torch import Tensor
from torchmetrics import MeanAbsoluteError, MeanMetric, Metric, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
    MultilabelAveragePrecision,
    MultilabelF1Score,
)

# Each of these is made for a given number of classes.
_OF_CLASSES: dict[str, Callable[[int], Metric]] = {
    "accuracy": lambda classes: MulticlassAccuracy(classes, average="micro"),
    "f1": lambda classes: BinaryF1Score() if classes == 2 else MulticlassF1Score(classes, average="macro"),
    "matthews": MulticlassMatthewsCorrCoef,
}
_OF_SEVERAL: dict[str, Callable[[int], Metric]] = {
    "f1_macro": lambda labels: MultilabelF1Score(labels, average="macro"),
    "f1_micro": lambda labels: MultilabelF1Score(labels, average="micro"),
    "average_precision": lambda labels: MultilabelAveragePrecision(labels, average="macro"),
}
_OF_NUMBERS: dict[str, Callable[[], Metric]] = {
    "pearson": PearsonCorrCoef,
    "spearman": SpearmanCorrCoef,
    "mae": MeanAbsoluteError,
}
METRICS = (*_OF_CLASSES, *_OF_SEVERAL, *_OF_NUMBERS)


def check_metrics(names: Sequence[str] | None) -> None:
    """Refuse names that no metric has.

    Raises:
        ValueError: There is one.
    """
    if unknown := [name for name in names or () if name not in METRICS]:
        raise ValueError(f"metrics={unknown!r} are not known: choose among {', '.join(METRICS)}")


def usual_metrics(num_classes: int, multi_label: bool = False) -> list[str]:
    """Return the default metrics: accuracy, those of several labels, or those of a regression (one class)."""
    if multi_label:
        return list(_OF_SEVERAL)
    return list(_OF_NUMBERS) if num_classes == 1 else ["accuracy"]


def make_metrics(names: Sequence[str], num_classes: int, multi_label: bool = False) -> dict[str, Metric]:
    """Make metrics of class indices, of several labels, or of numbers for a regression.

    Args:
        names: Names among ``accuracy``, ``f1`` (of class 1 if there are two classes, otherwise the mean over the
            classes) and ``matthews``; among ``f1_macro``, ``f1_micro`` and ``average_precision`` for several labels; or
            among ``pearson``, ``spearman`` and ``mae`` (mean absolute error).
        num_classes: Number of classes, or 1 for a regression.
        multi_label: Whether a sample may have several labels or none.

    Raises:
        ValueError: A metric does not suit the number of classes.

    Example:
        >>> list(make_metrics(["f1", "accuracy"], 2))
        ['f1', 'accuracy']
    """
    of_classes = _OF_SEVERAL if multi_label else _OF_CLASSES
    suited = _OF_NUMBERS if num_classes == 1 else of_classes
    for name in names:
        if name not in suited:
            kind = "a regression" if num_classes == 1 else f"{num_classes} {'labels' if multi_label else 'classes'}"
            raise ValueError(f"metrics={name!r} does not suit {kind}: choose among {', '.join(suited)}")
    if num_classes > 1:
        return {name: of_classes[name](num_classes) for name in names}
    with warnings.catch_warnings():  # Spearman's metric warns that it keeps all predictions, which it must
        warnings.filterwarnings("ignore", message="Metric `SpearmanCorrcoef`")
        return {name: _OF_NUMBERS[name]() for name in names}


def for_metrics(outputs: Tensor, labels: Tensor, num_classes: int, multi_label: bool) -> tuple[Tensor, Tensor]:
    """Predictions and labels of a batch as the metrics of :func:`make_metrics` take them.

    Args:
        outputs: Logits (batch, classes), or numbers (batch,).
        labels: Class indices (batch,), 0 and 1 for each of several labels (batch, classes), or numbers (batch,).
        num_classes: Number of classes.
        multi_label: Whether a sample may have several labels or none.
    """
    if num_classes == 1:
        return outputs.float(), labels
    return (outputs.float().sigmoid(), labels.long()) if multi_label else (outputs.argmax(-1), labels)


class Mean(MeanMetric):
    """A weighted mean that is NaN as soon as one value is.

    The mean of torchmetrics drops such values with a warning, and a run that has diverged would look well.

    Example:
        >>> import torch
        >>> mean = Mean()
        >>> mean.update(torch.tensor([1.0, 2.0]), weight=torch.tensor([3, 1]))
        >>> mean.compute().item()
        1.25
        >>> mean.update(torch.tensor(float("nan")))
        >>> mean.compute().item()
        nan
    """

    def __init__(self) -> None:
        super().__init__(nan_strategy=float("nan"))  # the value that takes the place of NaN


class Perplexity(Mean):
    """The exponential of a weighted mean of losses in nats.

    The perplexity of torchmetrics uses probabilities, which underflow to zero in float32 for very unlikely tokens.

    Example:
        >>> import torch
        >>> perplexity = Perplexity()
        >>> perplexity.update(torch.tensor([0.0, 2.0, 7.0]), torch.tensor([1, 1, 0]))
        >>> round(perplexity.compute().item(), 4)
        2.7183
    """

    def compute(self) -> Tensor:
        """Return the exponential of the mean."""
        return super().compute().exp()
