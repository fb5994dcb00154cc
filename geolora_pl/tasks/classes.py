"""Settle the number, names and weights of the classes from what the user gave and what the data say; losses of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]


def settle_num_classes(given: int | None, data: object) -> int:
    """Return the number of classes that the user gave or the data module has.

    Args:
        given: What the user gave.
        data: The data module, if there is one.

    Raises:
        ValueError: Neither gives the number, they disagree, or the data name a single class.
    """
    of_data: int | None = getattr(data, "num_classes", None)
    if of_data == 1 and (names := getattr(data, "class_names", None)):  # those of a regression name none
        raise ValueError(f"the data have one class, {names[0]!r}: there must be two, so add another")
    if given is not None and of_data is not None and given != of_data:
        raise ValueError(f"num_classes={given} does not fit the data, which has {of_data} classes: leave it out")
    settled = of_data if given is None else given
    if settled is None:
        raise ValueError("num_classes=None: the data module does not say how many classes there are, so give it")
    return settled


def settle_multi_label(given: bool | None, num_classes: int, data: object) -> bool:
    """Return whether a sample may have several labels or none, as the user or the data module says.

    Args:
        given: What the user or the checkpoint gave.
        num_classes: Number of classes.
        data: The data module, if there is one.

    Raises:
        ValueError: They disagree, or there is one class, which means a regression.
    """
    of_data: bool | None = getattr(data, "multi_label", None)
    if given is not None and of_data is not None and given != of_data:
        has = "several labels" if of_data else "one label"
        raise ValueError(f"multi_label={given} does not fit the data, whose samples have {has}: leave it out")
    settled = bool(of_data if given is None else given)
    if settled and num_classes == 1:
        raise ValueError("multi_label=True needs two or more labels; one class means a regression: leave it out")
    return settled


def make_loss(
    num_classes: int, multi_label: bool, weights: Sequence[float] | None, label_smoothing: float
) -> nn.Module:
    """Make the loss: cross-entropy, the binary one of every label, or the squared error of a number (one class).

    Args:
        num_classes: Number of classes.
        multi_label: Whether a sample may have several labels or none.
        weights: One weight per class, or ``None``.
        label_smoothing: Share of the target that is spread over all classes, in [0, 1).

    Raises:
        ValueError: Weights or smoothing were asked for where a sample has not exactly one class.
    """
    if multi_label or num_classes == 1:
        if weights is not None or label_smoothing:
            this = "its samples have several labels" if multi_label else "this is a regression"
            raise ValueError(
                f"class_weights and label_smoothing are for samples of one class each, but {this}: leave them out"
            )
        return nn.BCEWithLogitsLoss() if multi_label else nn.MSELoss()
    if weights is None:
        return nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    return WeightedCrossEntropy(torch.tensor(weights), label_smoothing=label_smoothing)


class WeightedCrossEntropy(nn.CrossEntropyLoss):
    """The mean cross-entropy by the weights of the classes, in 32 bits; 0, and not NaN, if no sample counts.

    A sample of a class with the weight 0 does not count at all, also with label smoothing.

    Example:
        >>> loss = WeightedCrossEntropy(torch.tensor([0.0, 1.0]))
        >>> loss(torch.zeros(2, 2), torch.tensor([0, 0])).item()
        0.0
    """

    weight: Tensor

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the mean for logits (batch, classes) and class indices (batch,)."""
        weight = self.weight.float()
        of_samples = weight[target]
        counted = target.masked_fill(of_samples == 0, self.ignore_index)
        losses = F.cross_entropy(input.float(), counted, weight, reduction="sum", label_smoothing=self.label_smoothing)
        whole = of_samples.sum()
        return losses / whole.masked_fill(whole == 0, 1.0)


def weight_of(loss: nn.Module, labels: Tensor) -> Tensor:
    """What a batch counts for in the mean of a loss over several batches: its samples, by the weights of their classes.

    Args:
        loss: As :func:`make_loss` makes it.
        labels: The labels of the batch (batch, ...).
    """
    if isinstance(loss, WeightedCrossEntropy):
        return loss.weight.float()[labels].sum()
    return torch.full((), len(labels), device=labels.device)


def probabilities(outputs: Tensor, num_classes: int, multi_label: bool) -> Tensor:
    """Probabilities of the classes (batch, classes) for logits; numbers (batch,) stay as they are."""
    if num_classes == 1:
        return outputs
    return outputs.sigmoid() if multi_label else outputs.softmax(-1)


def problem_type(num_classes: int, multi_label: bool) -> ProblemType:
    """What transformers call the kind of problem in a model's configuration.

    Example:
        >>> problem_type(1, False), problem_type(3, True)
        ('regression', 'multi_label_classification')
    """
    if num_classes == 1:
        return "regression"
    return "multi_label_classification" if multi_label else "single_label_classification"


def settle_class_names(given: Sequence[str] | None, num_classes: int, data: object) -> list[str] | None:
    """Return the names of the classes, which a checkpoint stores for data without labels.

    Args:
        given: What the user or the checkpoint gave.
        num_classes: Number of classes.
        data: The data module, if there is one.

    Returns:
        One name per class, or ``None`` if nobody names them.

    Raises:
        ValueError: There is not one name per class, a name is not a string, or the data have other names.
    """
    of_data: Sequence[str] | None = getattr(data, "class_names", None) or None
    if given is not None and not all(isinstance(name, str) for name in list[object](given)):
        raise ValueError(f"class_names={list(given)} must be strings: in YAML put 'no' and 'yes' into quotes")
    if given is not None and len(given) != num_classes:
        raise ValueError(f"class_names={list(given)} must be one name per class, and there are {num_classes} classes")
    if given is not None and of_data is not None and list(given) != list(of_data):
        raise ValueError(f"class_names={list(given)} do not fit the data, which have {list(of_data)}: leave them out")
    names = given or of_data
    return None if names is None else list(names)


def name_classes(config: Any, class_names: Sequence[str] | None) -> None:
    """Write the names of the classes into the configuration of a model of transformers, if there are names."""
    if class_names is not None:
        config.id2label = dict(enumerate(class_names))
        config.label2id = {name: index for index, name in enumerate(class_names)}


def check_class_weights(given: Sequence[float] | str | None) -> None:
    """Refuse class weights that are wrong for every data set.

    Raises:
        ValueError: The weights are a word other than ``balanced``, or one weight is below 0.
    """
    if given is None or given == "balanced":
        return
    if isinstance(given, str) or not all(weight >= 0 for weight in given):
        raise ValueError(f"class_weights={given!r} must be 'balanced', or one weight per class of at least 0")


def settle_class_weights(given: Sequence[float] | str | None, num_classes: int, data: object) -> list[float] | None:
    """Return the weight of each class in the loss.

    Args:
        given: The weights that the user gave, ``balanced`` or ``None``.
        num_classes: Number of classes.
        data: The data module, which counts the classes for ``balanced``.

    Returns:
        One weight per class. A balanced weight is the inverse of the class's share of the training samples, divided by
        the number of classes, so that the mean over the samples is 1.

    Raises:
        ValueError: There is not one weight per class, or the weights cannot be balanced.
    """
    if given is None:
        return None
    if not isinstance(given, str):
        if len(given) != num_classes:
            raise ValueError(
                f"class_weights={list(given)} must be one weight per class, and there are {num_classes} classes"
            )
        return list(given)
    counts: list[int] | None = getattr(data, "class_counts", None)
    if counts is None:
        raise ValueError(
            "class_weights='balanced': there is no data module that counts its classes, so list the weights"
        )
    if 0 in counts:
        raise ValueError(
            f"class_weights='balanced': class {counts.index(0)} does not occur in training: list the weights"
        )
    return [sum(counts) / (num_classes * count) for count in counts]
