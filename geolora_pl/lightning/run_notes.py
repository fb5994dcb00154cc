"""Keep what the user was told about data and model in the folder of the run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from geolora_pl.storage.atomic import atomic

NAME = "notes.txt"


def write_notes(trainer: L.Trainer, module: L.LightningModule, more: Iterable[str] = ()) -> None:
    """Write the notes of the data module and the module as ``notes.txt``, if a logger gives the run its own folder.

    Where there is nothing to note, the notes of an earlier run in the folder go.

    Args:
        trainer: The trainer of a fit that starts.
        module: The module that is trained.
        more: What was said beside the notes of both.
    """
    data = getattr(trainer, "datamodule", None)
    notes = [*getattr(data, "notes", ()), *getattr(module, "notes", ()), *more]
    folders = [str(logger.log_dir) for logger in trainer.loggers if isinstance(logger, CSVLogger | TensorBoardLogger)]
    if not trainer.is_global_zero or not folders or "://" in folders[0]:
        return
    target = Path(folders[0], NAME)
    if not notes:
        target.unlink(missing_ok=True)
        return
    with atomic(target) as unfinished:
        unfinished.write_text("".join(f"{line}\n" for line in notes), encoding="utf-8", errors="backslashreplace")
