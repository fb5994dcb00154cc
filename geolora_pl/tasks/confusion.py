"""Count in a validation how often each class was taken for which, and keep that in the folder of the run."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from torchmetrics.classification import MulticlassConfusionMatrix

from geolora_pl.lightning.internals import batches_that_stepped
from geolora_pl.lightning.run_folder import run_folder
from geolora_pl.report.confusion import MOST_CLASSES, Confusion, write_confusion


def confusion_matrix(num_classes: int, multi_label: bool = False) -> MulticlassConfusionMatrix | None:
    """A metric that counts predicted classes by class; ``None`` for numbers, for several labels, and for too many.

    Args:
        num_classes: Number of classes, or 1 for a regression; those of more than a table shows are too many.
        multi_label: Whether an input may have several of them.

    Example:
        >>> confusion_matrix(3).num_classes, confusion_matrix(1), confusion_matrix(1000)
        (3, None, None)
    """
    if multi_label or not 2 <= num_classes <= MOST_CLASSES:
        return None
    return MulticlassConfusionMatrix(num_classes, validate_args=False)  # the metrics beside it look at the labels


def keep_confusion(
    module: L.LightningModule, counted: MulticlassConfusionMatrix | None, names: Sequence[str] | None
) -> None:
    """Write what was counted in a validation of a fit as ``confusion.csv``, and count anew; call it in all processes.

    Args:
        module: The task, at the end of its validation.
        counted: Its metric, if it has one.
        names: The names of the classes, if anybody names them.
    """
    if counted is None:
        return
    trainer = module.trainer
    if trainer.state.fn is TrainerFn.FITTING and not trainer.sanity_checking:
        counts = counted.compute().tolist()
        if (folder := run_folder(trainer)) is not None:
            numbers = list(map(str, range(len(counts))))
            write_confusion(folder, Confusion(batches_that_stepped(trainer), names or numbers, counts))
    counted.reset()
