"""A CSV logger that never deletes what an earlier run in the same folder wrote; pictures for loggers that show them."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import loggers
from PIL import Image


class CSVLogger(loggers.CSVLogger):
    """Lightning's CSV logger for a fixed folder: an older ``metrics.csv`` is kept as ``metrics.1.csv`` and so on.

    Lightning's own deletes it, which loses the first part of a run that is resumed.

    Args:
        *args: Arguments of Lightning's ``CSVLogger``.
        **kwargs: Likewise.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> _ExperimentWriter:
        """The writer of this process."""
        if self._experiment is None:
            metrics = Path(self.log_dir) / "metrics.csv"
            if metrics.exists():
                number = 1
                while (older := metrics.with_suffix(f".{number}.csv")).exists():
                    number += 1
                metrics.rename(older)
            with warnings.catch_warnings():  # Lightning warns that the file will be deleted: it is safe by now
                warnings.filterwarnings("ignore", message="Experiment logs directory")
                writer: _ExperimentWriter = super().experiment
                return writer
        return self._experiment


def shows_pictures(logger: loggers.Logger) -> bool:
    """Whether a logger is one of those that :func:`show_picture` knows."""
    return isinstance(logger, (loggers.TensorBoardLogger, loggers.WandbLogger))


def show_picture(logger: loggers.Logger, name: str, picture: Image.Image, step: int) -> None:
    """Give a picture to TensorBoard or Weights & Biases.

    Args:
        logger: One that :func:`shows_pictures`.
        name: Under which it is shown.
        picture: In RGB.
        step: As the logger counts.
    """
    if isinstance(logger, loggers.TensorBoardLogger):
        logger.experiment.add_image(name, np.asarray(picture), step, dataformats="HWC")
    elif isinstance(logger, loggers.WandbLogger):
        logger.log_image(name, [picture], step)
