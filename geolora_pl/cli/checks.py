"""What the command line alone checks before a run begins: checkpoints, outputs, and the test after a fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden

from geolora_pl.lightning.internals import datamodule_of


def check_command(command: str, settings: Mapping[str, Any]) -> None:
    """Refuse to evaluate what was not trained, and an output that nothing is written to.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        settings: The settings of the command.

    Raises:
        ValueError: A checkpoint is missing, or there is an ``output`` that the command does not write.
    """
    if command != "fit" and not settings["ckpt_path"]:
        raise ValueError(
            f"ckpt_path=None: {command} would use a new head and untrained adapters: name the checkpoint of a run by "
            "--ckpt_path"
        )
    if command != "predict" and settings["output"] is not None:
        raise ValueError(f"output={settings['output']!r} is what predict writes: leave it out of {command}")


class CheckTestSplit(L.Callback):
    """Refuse, before the first step, a fit that is to end with a test that there is nothing for."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look for a test step and a test split.

        Raises:
            ValueError: The step or the split is missing.
        """
        data = datamodule_of(pl_module)
        splits = getattr(data, "splits", None)  # of a data module of ours, which is set up by now
        remedy = "set test_after_fit to false"
        if not is_overridden("test_step", pl_module):
            raise ValueError(f"test_after_fit=true and {type(pl_module).__name__} has no test_step: {remedy}")
        if isinstance(splits, Mapping) and not any(split.partition("_")[0] == "test" for split in splits):
            raise ValueError(
                f"test_after_fit=true and {type(data).__name__} has no test split, it has {', '.join(splits)}: {remedy}"
            )
        if not is_overridden("test_dataloader", pl_module if data is None else data):
            source = type(pl_module if data is None else data).__name__
            raise ValueError(f"test_after_fit=true and {source} has no test_dataloader: {remedy}")
