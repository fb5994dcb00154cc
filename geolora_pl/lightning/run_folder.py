"""The folder of a run, and what the user was told about data and model, which a fit leaves there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from geolora_pl.storage.atomic import atomic

NAME = "notes.txt"


def run_folder(trainer: L.Trainer) -> Path | None:
    """The folder that a logger gives to the run, in the process that writes; ``None`` if there is none on the disk."""
    folders = [str(logger.log_dir) for logger in trainer.loggers if isinstance(logger, CSVLogger | TensorBoardLogger)]
    return Path(folders[0]) if trainer.is_global_zero and folders and "://" not in folders[0] else None


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
    if (folder := run_folder(trainer)) is None:
        return
    target = folder / NAME
    if not notes:
        target.unlink(missing_ok=True)
        return
    with atomic(target) as unfinished:
        unfinished.write_text("".join(f"{line}\n" for line in notes), encoding="utf-8", errors="backslashreplace")
