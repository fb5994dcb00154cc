"""What is checked before a run begins: the trainer's settings and company, and the test that it ends with."""

from __future__ import annotations

from collections.abc import Mapping

import lightning as L
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden


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


def check_company(trainer: L.Trainer, small_checkpoints: bool) -> None:
    """Refuse strategies, precisions and callbacks that do not go together with adapters.

    Raises:
        ValueError: There is such a one.
    """
    sharded = isinstance(trainer.strategy, ModelParallelStrategy)
    if sharded and small_checkpoints:
        raise ValueError("small_checkpoints=True: ModelParallelStrategy cannot load such checkpoints: set it to false")
    if sharded and getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ValueError(
            "precision='16-mixed': with ModelParallelStrategy each process would see overflows of its own: take "
            "bf16-mixed"
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by the callback connector
        if isinstance(callback, (StochasticWeightAveraging, WeightAveraging)):
            raise ValueError(
                f"{type(callback).__name__} averages the orthonormal factors U and V entry by entry, which breaks "
                "them: remove it, or merge the adapters before weights are averaged"
            )


class CheckLast(L.Callback):
    """Refuse to test or predict with the last checkpoint where there is none: Lightning would take untrained adapters.

    A fit that asks for it starts anew, as Lightning means it: a job that is put back into the queue is always the same.
    """

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look whether a checkpoint was loaded.

        Raises:
            ValueError: None was.
        """
        if trainer.ckpt_path is None:
            folders = dict.fromkeys(str(getattr(each, "dirpath", None)) for each in trainer.checkpoint_callbacks)
            where = f"in {' or '.join(folders)}" if folders else "and no ModelCheckpoint to look for it"
            raise ValueError(f"ckpt_path='last': there is no last.ckpt {where}: give the path of a checkpoint")

    on_validation_start = on_predict_start = on_test_start


class CheckTestSplit(L.Callback):
    """Refuse, before the first step, a fit that is to end with a test that there is nothing for."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look for a test step and a test split.

        Raises:
            ValueError: One is missing.
        """
        data = trainer.datamodule  # type: ignore[attr-defined]  # set by the data connector
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
