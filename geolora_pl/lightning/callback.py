"""The Lightning callback: puts the adapters in, moves them after each optimizer step, logs their ranks."""

from __future__ import annotations

import math
from types import NoneType
from typing import Any

import lightning as L
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from geolora_pl.adapters.config import AdapterConfig
from geolora_pl.adapters.inject import has_adapters, inject_adapters
from geolora_pl.lightning.checkpoint_io import WholeFiles
from geolora_pl.lightning.checks import check_company
from geolora_pl.lightning.exact_resume import TrainingPosition
from geolora_pl.lightning.monitor import RankMonitor
from geolora_pl.lightning.summary import end_summary, print_summary, show_whole_numbers, start_summary, wants_tables
from geolora_pl.math.ranks import RankRule, usual_cadence
from geolora_pl.storage.checkpoint import describe_base, shrink
from geolora_pl.training.distributed import average_unsharded
from geolora_pl.training.integrator import RankAdaptiveIntegrator
from geolora_pl.training.steps import OnNonfinite, check_on_nonfinite


def run_length(trainer: L.Trainer) -> float:
    """Optimizer steps of the run; infinite where Lightning answers -1, as for a data set of unknown length."""
    steps = trainer.estimated_stepping_batches
    return math.inf if steps < 0 else steps


def _last_step(trainer: L.Trainer) -> int:
    """The number that Lightning gives to the loggers for the last batch, once it has been counted."""
    return max(0, trainer.fit_loop.epoch_loop._batches_that_stepped - 1)


class GeoLoRACallback(L.Callback):
    """Train any LightningModule with rank-adaptive adapters.

    A module without adapters gets them at the start, as ``adapter`` says; everything else is frozen but
    ``modules_to_save``. From then on the callback follows the optimizer's steps themselves, not batches, so that
    accumulation, manual optimization and the skipped steps of 16-bit training are counted rightly.

    It logs ``rank/mean``, ``rank/<adapter>``, ``adapter_params``, ``skipped_steps``, ``orthonormality_defect``, and of
    the last retraction ``truncation_error`` (relative Frobenius norm of what was dropped), ``energy_kept`` (one less
    its square) and ``adaptation_time`` in seconds; TensorBoard and Weights & Biases also get pictures: ``rank_map``,
    ``ranks_over_time``, ``spectra``. It prints a table before and after a fit, but for ``enable_model_summary=False``.

    Args:
        tau: Relative truncation tolerance, in [0, 1). Larger means smaller ranks.
        budget: Adapter parameters allowed in all, or ``None``.
        min_rank: Least rank of an adapter, at least 0.
        adapt_every: Optimizer steps from one retraction to the next, at least 1; by default 10, fewer in
            a run of less than 100 (:func:`usual_cadence`); a run that is resumed keeps its own.
        adapt_until: The part of the run in which ranks may change, in (0, 1]; after it (and once ranks that ``grow``
            have been judged) the retraction goes on at the ranks found.
        grow: Whether the ranks grow first, so that where they end hardly depends on where they start: before
            ``adapt_every`` steps are over, retract after 1, 2, 4, ... of them and drop nothing; only then ``tau``
            judges. The ranks end larger, and the largest learning rate that works is smaller.
        on_nonfinite: What a gradient that is not finite does: ``skip`` the step and go on, or ``raise`` before anything
            has changed.
        small_checkpoints: Whether checkpoints leave out the frozen weights. The module must bring the same base when
            such a one is loaded; its hash is compared.
        adapter: What to adapt in a module that has no adapters of its own; by default ``AdapterConfig()``. Name a new
            head in ``modules_to_save``, or it stays frozen.

    Raises:
        ValueError: An argument is out of range, or the run cannot work: the module's optimizers do not hold the
            adapters, weights are averaged, or the run is shorter than ``adapt_every``.
        RuntimeError: Training ended without a single adaptation.
        FloatingPointError: A gradient is not finite, with ``on_nonfinite="raise"``.

    Example:
        >>> trainer = L.Trainer(callbacks=GeoLoRACallback(tau=0.2), logger=False)
    """

    def __init__(
        self,
        tau: float = 0.2,
        budget: int | None = None,
        min_rank: int = 1,
        adapt_every: int | None = None,
        adapt_until: float = 1.0,
        grow: bool = False,
        on_nonfinite: OnNonfinite = "skip",
        small_checkpoints: bool = False,
        adapter: AdapterConfig | None = None,
    ) -> None:
        RankRule(tau, budget, min_rank, 1 if adapt_every is None else adapt_every, grow)  # raises here, not at the fit
        check_on_nonfinite(on_nonfinite)
        if not 0 < adapt_until <= 1:
            raise ValueError(f"adapt_until={adapt_until!r} must lie in (0, 1]: it is a part of the run")
        self.tau = tau
        self.budget = budget
        self.min_rank = min_rank
        self.adapt_every = adapt_every
        self.adapt_until = adapt_until
        self.grow = grow
        self.on_nonfinite = on_nonfinite
        self.small_checkpoints = small_checkpoints
        self.adapter = adapter
        self.integrator: RankAdaptiveIntegrator | None = None
        self.monitor: RankMonitor | None = None
        self._injected = False
        self._restored: dict[str, Any] | None = None
        self._optimizer: Optimizer | None = None
        self._hook: RemovableHandle | None = None
        self._position = TrainingPosition()
        self._base: dict[str, Any] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Put the adapters in before weights are loaded and optimizers are made."""
        check_company(trainer, self.small_checkpoints)
        if type(trainer.strategy._checkpoint_io) in (NoneType, TorchCheckpointIO, WholeFiles):  # not the user's own
            trainer.strategy._checkpoint_io = WholeFiles(pl_module)
        if not has_adapters(pl_module) and isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            raise ValueError(
                f"{type(pl_module).__name__} would get its adapters in a forked or spawned process, and the process "
                "that started it would never see them: use strategy='ddp', or before trainer.fit call "
                "module.configure_model() of a GeoLoRAModule, or inject_adapters(module, config)"
            )
        if not has_adapters(pl_module) and is_overridden("configure_model", pl_module):
            # Lightning builds such a module only after this hook; its configure_model must be idempotent.
            with (
                trainer.strategy.tensor_init_context(),
                trainer.strategy.model_sharded_context(),
                trainer.precision_plugin.module_init_context(),
            ):
                pl_module.configure_model()
        if not has_adapters(pl_module):
            inject_adapters(pl_module, self.adapter)
            self._injected = True
        elif self.adapter is not None and not self._injected:
            raise ValueError(
                f"{type(pl_module).__name__} has adapters of its own and the callback was given adapter="
                f"{self.adapter}: say what to adapt in one of the two places"
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the run before its first step and start to follow the optimizer."""
        steps = run_length(trainer)
        adapt_every = self.adapt_every or self._cadence_so_far(trainer) or usual_cadence(steps)
        integrator = RankAdaptiveIntegrator(
            pl_module, self.tau, self.budget, self.min_rank, adapt_every, self.grow, self.on_nonfinite
        )
        wrapped = trainer.strategy.model
        if isinstance(wrapped, DistributedDataParallel) and not (
            wrapped.find_unused_parameters or wrapped.static_graph
        ):
            integrator.require_gradients()
        holders = [optimizer for optimizer in trainer.optimizers if integrator.is_trained_by(optimizer)]
        if len(holders) != 1:
            raise ValueError(
                f"{len(holders)} of the {len(trainer.optimizers)} optimizers hold adapters, and exactly one must: in "
                "configure_optimizers, give every parameter that requires gradients to one optimizer, or keep those "
                "of other optimizers out of the adapters with exclude_modules"
            )
        integrator.check_optimizer(holders[0])
        steps_are_known = pl_module.automatic_optimization and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if steps_are_known and 0 < steps < adapt_every:
            raise ValueError(
                f"adapt_every={adapt_every} is longer than the run of {steps} optimizer steps: lower it to at "
                f"most {steps}"
            )
        if self.adapt_until < 1 and math.isinf(steps):
            raise ValueError(
                f"adapt_until={self.adapt_until} is a part of a run without an end: set max_steps or max_epochs"
            )
        adapting = self.adapt_until * steps if self.adapt_until < 1 else math.inf
        monitor = RankMonitor(integrator)
        if trainer.global_step and self.integrator and self.integrator.adapters == integrator.adapters:
            integrator.load_state_dict(self.integrator.state_dict())  # a second fit with the same trainer goes on
            assert self.monitor is not None
            monitor.load_state_dict(self.monitor.state_dict())
        self.integrator, self.monitor, self._optimizer = integrator, monitor, holders[0]
        self._take_up()

        def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            # Batches, as the length of the run is counted, not steps; and ranks are not left as they have grown.
            integrator.rank_changes = integrator.growing or trainer.fit_loop.epoch_loop._batches_that_stepped < adapting
            began = monitor.clock.now()
            if integrator.step(optimizer):
                monitor.clock.add(began)
            if steps_are_known and trainer.fit_loop.epoch_loop._batches_that_stepped + 1 == steps:
                self._retract_pending()  # before the last validation and checkpoint, which are of the final ranks then

        self._hook = holders[0].register_step_post_hook(after_step)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Reduce the gradients of the adapters where the strategy does not, before they are clipped."""
        if isinstance(trainer.strategy, ModelParallelStrategy):
            average_unsharded([p for group in optimizer.param_groups for p in group["params"]])

    def _cadence_so_far(self, trainer: L.Trainer) -> int | None:
        """The cadence of the run that is resumed, or of an earlier fit with the same trainer, which goes on."""
        if self._restored is not None:
            return self._restored.get("adapt_every")
        return self.integrator.adapt_every if trainer.global_step and self.integrator else None

    def _take_up(self) -> None:
        """Go on from what was restored: factors always, for another process's may have been sent to this one."""
        assert self.integrator is not None
        assert self.monitor is not None
        for layer in self.integrator.adapters.values():
            layer.read_rank()
        restored, self._restored = self._restored, None
        if restored is None:
            return
        ours, theirs = type(self._optimizer).__name__, restored["optimizer"]
        if ours != theirs:
            raise ValueError(
                f"the checkpoint was made with the optimizer {theirs} and this run has {ours}, which cannot take up "
                "its state: use the same one, or start a new run from the weights"
            )
        self.integrator.adapt_every = self.adapt_every or restored["adapt_every"]
        self.integrator.load_state_dict(restored["integrator"])
        self.monitor.load_state_dict(restored["monitor"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what is adapted, and go to the batch that comes next, where a run is resumed."""
        assert self.monitor is not None
        self._position.train_starts(trainer)
        show_whole_numbers(trainer.progress_bar_callback)
        if wants_tables(trainer):
            print_summary(*start_summary(pl_module, self.monitor))
        if not trainer.global_step:
            self.monitor.log(trainer, 0)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let a validation leave no trace in the random numbers of the training."""
        self._position.validation_ended()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the ranks as often as the trainer logs, and at the end of an epoch, however short it is."""
        assert self.monitor is not None
        stepped = not (pl_module.automatic_optimization and trainer.fit_loop._should_accumulate())
        if stepped and (trainer._logger_connector.should_update_logs or trainer.is_last_batch):  # as Lightning itself
            self.monitor.log(trainer, trainer.fit_loop.epoch_loop._batches_that_stepped)
        self._position.batch_ended(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The same where an epoch was cut short."""
        assert self.monitor is not None
        if self.monitor.shown != _last_step(trainer):
            self.monitor.log(trainer, _last_step(trainer))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave a retracted state behind, or say that there never was an adaptation."""
        assert self.integrator is not None
        assert self.monitor is not None
        if self._retract_pending():
            self.monitor.log(trainer, _last_step(trainer))
        if self.integrator.adaptations == 0 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise RuntimeError(
                "training ended without one adaptation of the ranks: no optimizer step was taken, and "
                f"{self.integrator.skipped_steps} were skipped for gradients that are not finite; a step in which no "
                "adapter has a gradient does not count"
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what was found; a run that had ended may have been resumed, without any training."""
        self._retract_pending()
        assert self.monitor is not None
        if trainer.is_global_zero:
            self.monitor.show(trainer.loggers, _last_step(trainer), at_last=True)
        if wants_tables(trainer):
            print_summary(*end_summary(trainer, pl_module, self.monitor))

    def _retract_pending(self) -> bool:
        if self.integrator is None or self.monitor is None:
            return False
        self.integrator.settle()
        if not (self.integrator.steps or (self.integrator.growing and self.integrator.adaptations)):
            return False
        began = self.monitor.clock.now()
        self.integrator.retract(self._optimizer)
        self.monitor.clock.add(began)
        return True

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stop following the optimizer."""
        self._let_go()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stop following the optimizer."""
        self._let_go()

    def _let_go(self) -> None:
        self._position.close()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self.integrator is not None:
            self.integrator.close()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Leave the base out, if asked to."""
        if self.small_checkpoints:
            self._base = self._base or describe_base(pl_module)  # it does not change
            shrink(checkpoint, pl_module, self._base)

    def state_dict(self) -> dict[str, Any]:
        """The integrator's counters and the ranks so far, for a run that is resumed."""
        if self.integrator is None or self.monitor is None:
            return {}
        return {
            "integrator": self.integrator.state_dict(),
            "monitor": self.monitor.state_dict(),
            "optimizer": type(self._optimizer).__name__,
            "adapt_every": self.integrator.adapt_every,
            "position": self._position.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the counters until the integrator is made; strategies that shard restore after that."""
        self._restored = state_dict or None
        if state_dict:
            self._position.load_state_dict(state_dict["position"])
            if self._hook is not None:
                self._take_up()
