"""A CSV logger that never deletes what an earlier run in the same folder wrote."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import loggers


class CSVLogger(loggers.CSVLogger):
    """Lightning's CSV logger for a fixed folder: an older ``metrics.csv`` is kept as ``metrics.1.csv`` and so on.

    Lightning's own logger deletes it, which loses the first part of a run that is resumed.

    Args:
        *args: Arguments of Lightning's ``CSVLogger``.
        **kwargs: Further arguments of Lightning's ``CSVLogger``.
    """

    _older_is_kept = False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer of this process."""
        if not self._older_is_kept:
            self._keep_older()
        with warnings.catch_warnings():  # Lightning warns that the older file will be deleted, but it is safe by now
            warnings.filterwarnings("ignore", message="Experiment logs directory")
            return super().experiment

    def _keep_older(self) -> None:
        self._older_is_kept = True
        metrics = Path(self.log_dir) / "metrics.csv"
        if not metrics.exists():
            return
        number = 1
        while (older := metrics.with_suffix(f".{number}.csv")).exists():
            number += 1
        metrics.rename(older)
