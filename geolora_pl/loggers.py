"""A CSV logger that never deletes what an earlier run in the same folder wrote."""

from __future__ import annotations

import warnings
from pathlib import Path

from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import loggers


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
