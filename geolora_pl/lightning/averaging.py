"""The callback that averages weights along a run, as Lightning's ``EMAWeightAveraging`` does without adapters."""

from __future__ import annotations

from itertools import chain
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from geolora_pl.adapters.base import FACTORS
from geolora_pl.lightning.callback import GeoLoRACallback
from geolora_pl.lightning.internals import callbacks_of
from geolora_pl.storage.adapter_state import base_buffers
from geolora_pl.storage.checkpoint import CURRENT
from geolora_pl.training.averaging import RunningMean
from geolora_pl.training.integrator import RankAdaptiveIntegrator


class GeoLoRAEMAWeightAveraging(L.Callback):
    """Average the weights over the steps of a run, for modules with adapters.

    It stands for Lightning's ``EMAWeightAveraging`` and has the arguments below from there: an exponential moving
    average, begun with the state after the first update. Of an adapter the update is averaged and not its factors,
    which would not stay orthonormal; what is trained in full is averaged entry by entry, and so are buffers.

    Validations see the averaged weights, and so does ``on_validation_epoch_end``. A checkpoint has them as its
    ``state_dict``: ``test``, ``load_from_checkpoint`` and ``export`` take them. A fit that is resumed goes on from the
    weights as they were trained, which lie beside them. After the fit the averaged weights are in the module. They have
    the ranks of the trained ones. Before the first update all is as without this callback, and after a rollback the
    average is begun again.

    Args:
        decay: What the average so far counts for in an update, in [0, 1).
        update_every_n_steps: Optimizer steps from one update of the average to the next, at least 1.
        update_starting_at_step: The first step, counted from 0, after which the average is updated; at least 0.
        use_buffers: Whether buffers of floating-point numbers are averaged, such as running statistics.

    Raises:
        ValueError: An argument is out of range, the trainer has no :class:`GeoLoRACallback`, weights are sharded, or
            the checkpoints are to be written without the state of callbacks.

    Example:
        >>> averaging = GeoLoRAEMAWeightAveraging(decay=0.99, update_starting_at_step=100)
        >>> trainer = L.Trainer(callbacks=[GeoLoRACallback(), averaging], logger=False)
    """

    def __init__(
        self,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int = 0,
        use_buffers: bool = True,
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay!r} must lie in [0, 1): at 1 the average would never move")
        if update_every_n_steps < 1:
            raise ValueError(f"update_every_n_steps={update_every_n_steps!r} must be at least 1")
        if update_starting_at_step < 0:
            raise ValueError(f"update_starting_at_step={update_starting_at_step!r} must be at least 0")
        self.decay = decay
        self.update_every_n_steps = update_every_n_steps
        self.update_starting_at_step = update_starting_at_step
        self.use_buffers = use_buffers
        self._mean: RunningMean | None = None  # of the fit that is under way, or of the last one
        self._trained: list[tuple[Tensor, Tensor]] = []  # what the averaged weights stand in the place of
        self._parameters: list[nn.Parameter] = []  # of the module
        self._required = 0  # how many of them required gradients at the last step
        self._latest_step = 0
        self._restored: dict[str, Any] | None = None  # from a checkpoint, until the fit starts

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a run that cannot be averaged, and forget the last one."""
        if stage != "fit":
            return
        self._mean, self._trained, self._latest_step, self._restored = None, [], 0, None
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                f"{type(self).__name__} needs whole weights, and ModelParallelStrategy shards them: use strategy='ddp'"
            )
        _follower(trainer)
        for saver in trainer.checkpoint_callbacks:
            if isinstance(saver, ModelCheckpoint) and saver.save_weights_only:
                raise ValueError(
                    f"save_weights_only=True of {type(saver).__name__} writes checkpoints without asking any callback, "
                    "so that they would not hold the averaged weights: set it to false"
                )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin an average, or take up that of the checkpoint."""
        self._begin(trainer, pl_module)

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        integrator = _integrator_of(trainer)
        self._parameters = list(pl_module.parameters())
        self._required = self._count_of_required()
        self._mean = RunningMean(integrator, self._places(integrator, pl_module))
        if self._restored is not None:
            self._latest_step = self._restored["latest_step"]
            self._mean.load_state_dict(self._restored["mean"])
            self._restored = None

    def _count_of_required(self) -> int:
        return sum(parameter.requires_grad for parameter in self._parameters)

    def _places(
        self, integrator: RankAdaptiveIntegrator, pl_module: L.LightningModule
    ) -> dict[str, tuple[nn.Module, str]]:
        """What is averaged beside the adapters, by name, as a module and the name of its parameter or buffer."""
        factors = {id(getattr(layer, name)) for layer in integrator.adapters.values() for name in FACTORS}
        tensors: dict[str, Tensor] = {
            name: p for name, p in pl_module.named_parameters() if p.requires_grad and id(p) not in factors
        }
        if self.use_buffers:
            tensors |= {name: b for name, b in base_buffers(pl_module).items() if b.is_floating_point()}
        places = {
            id(tensor): (module, name)
            for module in pl_module.modules()
            for name, tensor in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        }
        return {name: places[id(tensor)] for name, tensor in tensors.items()}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Average from now on what a callback has thawed."""
        if self._required != (required := self._count_of_required()):
            self._required = required
            assert self._mean is not None, "made in on_train_start"
            self._mean.take_in(self._places(_integrator_of(trainer), pl_module))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average, if the optimizer has stepped and it is time."""
        step = trainer.global_step - 1  # counted from 0, as Lightning's callback does
        if step < self._latest_step or step < self.update_starting_at_step or step % self.update_every_n_steps:
            return
        assert self._mean is not None, "made in on_train_start"
        self._mean.update(self.decay)
        self._latest_step = trainer.global_step

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the averaged weights into the module, in a fit."""
        if trainer.state.fn is TrainerFn.FITTING:
            self._put_in()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the trained weights back, before a checkpoint is written."""
        if trainer.state.fn is TrainerFn.FITTING:
            self._put_back()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the averaged weights in the module."""
        _follower(trainer).finish(trainer)  # which must not find averaged weights to move
        self._put_in()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Do so after a run that had ended and was resumed, without any training, as well."""
        if self._mean is None:
            self._begin(trainer, pl_module)
            self.on_train_end(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Put the trained weights back, if it was raised in a validation of the fit."""
        if trainer.state.fn is TrainerFn.FITTING and trainer.validating:
            self._put_back()

    @torch.no_grad()
    def _put_in(self) -> None:
        if self._mean is None or not self._mean.started or self._trained:
            return
        for tensor, value in self._mean.values():
            self._trained.append((tensor, tensor.detach().clone()))
            tensor.copy_(value)

    @torch.no_grad()
    def _put_back(self) -> None:
        for tensor, value in self._trained:
            tensor.copy_(value)
        self._trained = []

    def state_dict(self) -> dict[str, Any]:
        """The average and where it stands, for a run that is resumed."""
        if self._mean is None:
            return {}
        return {"latest_step": self._latest_step, "mean": self._mean.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the average until the training starts."""
        self._restored = state_dict or None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let the averaged weights be those of the checkpoint, and the trained ones lie beside them."""
        if self._mean is None or not self._mean.started:
            return
        # What stands in the place of the trained weights is saved as it is: a test may have loaded another checkpoint.
        others = {id(tensor): value for tensor, value in self._trained or self._mean.values()}
        weights, there = checkpoint["state_dict"], pl_module.state_dict(keep_vars=True)
        ours = {name: tensor for name, tensor in weights.items() if id(there.get(name)) in others}
        exchanged = {name: others[id(there[name])] for name in ours}
        checkpoint[CURRENT] = exchanged if self._trained else ours
        checkpoint["state_dict"] = weights if self._trained else {**weights, **exchanged}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let a fit go on from the weights as they were trained."""
        if trainer.state.fn is TrainerFn.FITTING and CURRENT in checkpoint:
            pl_module.load_state_dict(checkpoint[CURRENT], strict=False)


def _integrator_of(trainer: L.Trainer) -> RankAdaptiveIntegrator:
    integrator = _follower(trainer).integrator
    assert integrator is not None, "GeoLoRACallback makes it in on_fit_start"
    return integrator


def _follower(trainer: L.Trainer) -> GeoLoRACallback:
    """The callback that moves the adapters."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, GeoLoRACallback):
            return callback
    raise ValueError(
        "GeoLoRAEMAWeightAveraging averages the updates of adapters, and the trainer has no GeoLoRACallback: add one "
        "to its callbacks, or use EMAWeightAveraging of Lightning for a model without adapters"
    )
