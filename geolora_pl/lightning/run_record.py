"""What identifies a fit, for its folder: model, data, settings, versions, and how long it took."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import Optimizer

from geolora_pl.adapters.counts import Counts
from geolora_pl.lightning.monitor import RankMonitor
from geolora_pl.lightning.run_folder import run_folder
from geolora_pl.report.confusion import NAME as CONFUSION
from geolora_pl.report.record import BETTER, VERSION, write_record

_PACKAGES = ("geolora_pl", "lightning", "torch")


class RunRecord:
    """Writes what identifies a fit into the folder of its run, when it starts and again when it ends.

    Args:
        trainer: The trainer of the fit.
        module: The module that is trained.
        optimizer: The one that holds the adapters.
        monitor: That of the fit.
    """

    def __init__(
        self, trainer: L.Trainer, module: L.LightningModule, optimizer: Optimizer, monitor: RankMonitor
    ) -> None:
        self._trainer, self._monitor = trainer, monitor
        self._known = {**_known(trainer, module, optimizer, monitor), "first_step": trainer.global_step}
        if not trainer.global_step and (folder := run_folder(trainer)) is not None:
            (folder / CONFUSION).unlink(missing_ok=True)  # of an earlier run
        self.write()

    def write(self) -> None:
        """Write the record as it is now."""
        if (folder := run_folder(self._trainer)) is not None:
            now = {"last_step": self._trainer.global_step, "seconds": round(self._monitor.seconds, 3)}
            write_record(folder, {**self._known, **now})


def _known(
    trainer: L.Trainer, module: L.LightningModule, optimizer: Optimizer, monitor: RankMonitor
) -> dict[str, str | int | float]:
    integrator, group = monitor.integrator, optimizer.param_groups[0]
    counts = Counts.of(module, integrator.adapters)
    device = trainer.strategy.root_device
    known: dict[str, Any] = {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "model": _model(module),
        "data": _data(trainer),
        "seed": os.environ.get("PL_GLOBAL_SEED"),
        "optimizer": type(optimizer).__name__,
        "lr": float(group.get("initial_lr", group["lr"])),
        "tau": integrator.rule.tau,
        "budget": integrator.rule.budget,
        "adapt_every": integrator.adapt_every,
        "in_full": counts.in_full,
        "base": counts.base,
        "per_rank": counts.per_rank,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
        **_versions(),
    }
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor:
            known[f"{BETTER}{callback.monitor}"] = callback.mode
    return {name: value for name, value in known.items() if value is not None}


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):  # a folder on the path of Python is not installed
            found[f"{VERSION}{name}"] = version(name)
    return {**found, f"{VERSION}Python": platform.python_version()}


def _model(module: L.LightningModule) -> str:
    """The name by which a task loads its model, or that of the class."""
    name = module.hparams.get("model_name")
    return name if isinstance(name, str) else type(module).__name__


def _data(trainer: L.Trainer) -> str | None:
    """The data module, with the name of what it reads; or the class of the data set."""
    data: Any = getattr(trainer, "datamodule", None)
    if data is None:
        dataset = getattr(trainer.train_dataloader, "dataset", None)
        return None if dataset is None else type(dataset).__name__
    read = [getattr(data, name, None) for name in ("task", "dataset", "folder")]
    what = next((f" {Path(name).name}" for name in read if isinstance(name, str | Path)), "")
    return f"{type(data).__name__}{what}"
