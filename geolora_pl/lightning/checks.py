"""What is refused before a run begins: settings of the trainer, what does not go with adapters."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.optim import Optimizer

from geolora_pl.lightning.internals import MultiProcessingLauncher, callbacks_of
from geolora_pl.storage.checkpoint import CURRENT
from geolora_pl.training.integrator import RankAdaptiveIntegrator


def check_trainer(trainer: L.Trainer) -> None:
    """Refuse what Lightning takes and cannot mean.

    Raises:
        ValueError: A number of steps or epochs of the trainer leaves nothing to train, a bound is negative, or torchrun
            started another number of processes than the trainer has.
    """
    if TorchElasticEnvironment.detect() and (started := TorchElasticEnvironment().world_size()) != trainer.world_size:
        raise ValueError(
            f"torchrun started {started} processes and the trainer has {trainer.world_size}: each would train by "
            "itself into the same folder: set trainer.strategy=ddp, and trainer.devices to the processes on a machine"
        )
    if trainer.accumulate_grad_batches < 1:
        raise ValueError(f"accumulate_grad_batches={trainer.accumulate_grad_batches} must be at least 1")
    if (clip := trainer.gradient_clip_val) is not None and not clip >= 0:
        raise ValueError(f"gradient_clip_val={clip} must be at least 0: a negative norm turns gradients around")
    if trainer.val_check_interval == 0:
        raise ValueError("val_check_interval=0 must be above 0: use limit_val_batches=0 for no validation")
    for name in ("max_epochs", "max_steps", "limit_train_batches"):
        if getattr(trainer, name) == 0:
            raise ValueError(f"{name}=0 leaves nothing to train: raise it, or use validate or test")


def check_compatible(trainer: L.Trainer, small_checkpoints: bool) -> None:
    """Refuse strategies, precisions and callbacks that do not go together with adapters.

    Raises:
        ValueError: One of them is in use.
    """
    sharded = isinstance(trainer.strategy, ModelParallelStrategy)
    if sharded and small_checkpoints:
        raise ValueError("small_checkpoints=True: ModelParallelStrategy cannot load such checkpoints: set it to false")
    if sharded and getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ValueError(
            "precision='16-mixed': with ModelParallelStrategy each process would see overflows of its own: take "
            "bf16-mixed"
        )
    for callback in callbacks_of(trainer):
        if isinstance(callback, (StochasticWeightAveraging, WeightAveraging)):
            raise ValueError(
                f"{type(callback).__name__} averages the orthonormal factors U and V entry by entry, which breaks "
                "them: take GeoLoRAEMAWeightAveraging, which averages the updates"
            )
        if isinstance(callback, ModelPruning):
            raise ValueError(
                "ModelPruning puts masked weights into the layers that the adapters read, and zeros into U and V: "
                "remove it, and prune the merged model after the fit"
            )


def check_averaged(checkpoint: Mapping[str, Any], trainer: L.Trainer) -> None:
    """Refuse to go on from averaged weights, with an optimizer's state that belongs to the trained ones.

    Raises:
        ValueError: The checkpoint has both, and the trainer no callback that tells them apart.
    """
    states = checkpoint.get("callbacks", {})
    here = [states.get(callback.state_key) for callback in callbacks_of(trainer)]
    if CURRENT in checkpoint and not any(isinstance(state, Mapping) and "mean" in state for state in here):
        raise ValueError(
            "the state_dict of the checkpoint holds averaged weights, from which training cannot go on: add "
            "GeoLoRAEMAWeightAveraging to the callbacks, as the run had it, which takes the trained ones"
        )


def check_monitors(trainer: L.Trainer) -> None:
    """Refuse a callback or scheduler that waits for a metric of the validation which the validation does not log.

    Called at the end of Lightning's sanity check, the first time that a run validates. What only the training logs
    is not known by then.

    Raises:
        ValueError: There is one.
    """
    known = [name for name in trainer.callback_metrics if name.startswith("val")]
    waiting = [
        (type(callback).__name__, callback.monitor)
        for callback in callbacks_of(trainer)
        if isinstance(callback, (EarlyStopping, ModelCheckpoint))
    ]
    waiting += [
        (type(config.scheduler).__name__, config.monitor)
        for config in trainer.lr_scheduler_configs
        if config.reduce_on_plateau
    ]
    for owner, monitor in waiting:
        if known and monitor and monitor.startswith("val") and monitor not in known:
            near = difflib.get_close_matches(monitor, known, n=1)
            meant = f"did you mean {near[0]!r}?" if near else "name one of these"
            raise ValueError(
                f"monitor={monitor!r} of {owner} is not among what the validation logs, {', '.join(known)}: {meant} "
                "(num_sanity_val_steps=0 for one that is logged later)"
            )


def check_launcher(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Refuse to put adapters into a module whose copy in this process would never see them.

    Raises:
        ValueError: The trainer forks or spawns its processes.
    """
    if isinstance(trainer.strategy.launcher, MultiProcessingLauncher):
        raise ValueError(
            f"{type(module).__name__} would get its adapters in a forked or spawned process, and the process that "
            "started it would never see them: use strategy='ddp', or before trainer.fit call "
            "module.configure_model() of a GeoLoRAModule, or inject_adapters(module, config)"
        )


def check_sends_no_codes(trainer: L.Trainer) -> None:
    """Refuse a strategy that would send a quantised base to another process at the end of a fit.

    Raises:
        ValueError: The trainer forks or spawns its processes.
    """
    if isinstance(trainer.strategy.launcher, MultiProcessingLauncher):
        raise ValueError(
            "a forked or spawned process sends the model back when it ends, which quantised weights cannot be: use "
            "strategy='ddp'"
        )


def optimizer_of_adapters(trainer: L.Trainer, integrator: RankAdaptiveIntegrator) -> Optimizer:
    """The one optimizer that holds the adapters.

    Raises:
        ValueError: None of them or several hold adapters, or the one that does cannot train them.
    """
    holders = [optimizer for optimizer in trainer.optimizers if integrator.is_trained_by(optimizer)]
    if len(holders) != 1:
        raise ValueError(
            f"{len(holders)} of the {len(trainer.optimizers)} optimizers hold adapters, and exactly one must: in "
            "configure_optimizers, give every parameter that requires gradients to one optimizer, or keep those of "
            "other optimizers out of the adapters with exclude_modules"
        )
    integrator.check_optimizer(holders[0])
    return holders[0]
