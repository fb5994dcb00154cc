"""The Lightning callback: puts the adapters in, moves them after each optimizer step, logs their ranks."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import lightning as L
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from geolora_pl.adapters.config import AdapterConfig
from geolora_pl.adapters.experts import frozen_experts
from geolora_pl.adapters.inject import find_adapters, has_adapters, inject_adapters
from geolora_pl.adapters.quantised import quantised_names
from geolora_pl.lightning.checkpoint_io import WholeFiles, forget_other_files
from geolora_pl.lightning.checks import (
    check_averaged,
    check_compatible,
    check_launcher,
    check_monitors,
    check_sends_no_codes,
    check_trainer,
    optimizer_of_adapters,
)
from geolora_pl.lightning.hyperparameters import keep_plain, say_what_is_not_plain
from geolora_pl.lightning.internals import accumulates, batches_that_stepped, datamodule_of, logs_this_batch, run_length
from geolora_pl.lightning.monitor import RankMonitor
from geolora_pl.lightning.progress import fit_bar
from geolora_pl.lightning.run import Run
from geolora_pl.lightning.run_folder import write_notes
from geolora_pl.lightning.summary import end_summary, start_summary, wants_tables
from geolora_pl.math.ranks import RankRule, usual_cadence
from geolora_pl.notes import note
from geolora_pl.report.printed import print_summary
from geolora_pl.storage.checkpoint import check_adapters, describe_adapters, describe_base, leave_out_base
from geolora_pl.training.distributed import average_unsharded
from geolora_pl.training.divergence import OnDivergence, check_on_divergence
from geolora_pl.training.following import check_adapt_until, check_adapted, check_length
from geolora_pl.training.integrator import RankAdaptiveIntegrator
from geolora_pl.training.internals import leave_to_each_process
from geolora_pl.training.steps import OnNonfinite, check_on_nonfinite

_INJECTED = "_geolora_adapter"  # the attribute in which a module remembers what a callback has adapted


class GeoLoRACallback(L.Callback):
    """Train any LightningModule with rank-adaptive adapters.

    A module without adapters gets them at the start, as ``adapter`` says; everything else is frozen but
    ``modules_to_save``. From then on the callback follows the optimizer's steps themselves, not batches, so that
    accumulation, manual optimization and the skipped steps of 16-bit training are counted rightly.

    It logs ``rank/<adapter>`` and, in the group ``geolora/``, ``mean_rank``, ``adapter_params`` (of live ranks, without
    probes), ``lr_<group>`` and ``gradient_norm`` of the last step, ``skipped_steps``, ``rollbacks``,
    ``orthonormality_defect``, and of the last retraction ``truncation_error`` (relative Frobenius norm of what was
    dropped), ``energy_kept`` (one less its square) and ``adaptation_time`` in seconds; TensorBoard and Weights & Biases
    also get the pictures ``rank_map``, ``ranks_over_time`` and ``spectra``. It prints a table before and after a fit,
    but for ``enable_model_summary=False``.

    Args:
        tau: Relative truncation tolerance, in [0, 1). Larger means smaller ranks.
        budget: Adapter parameters allowed in all, or ``None``.
        min_rank: Least rank of an adapter, at least 0.
        adapt_every: Optimizer steps from one retraction to the next, at least 1; by default 10, fewer in
            a run of less than 100 (:func:`usual_cadence`); a run that is resumed keeps its own.
        adapt_until: The part of the run in which ranks may change, in (0, 1]; after it the retraction goes on
            at the ranks found.
        coefficient_steps: Optimizer steps that train the coefficients alone, at least 0, between an augmentation of the
            bases and its truncation: the schedule of the authors' code, with ``adapt_every=1`` and adapters without
            probes. After ``adapt_until`` the coefficients alone are trained.
        on_nonfinite: What a gradient that is not finite does: ``skip`` the step and go on, or ``raise`` before anything
            has changed.
        on_divergence: What to do when the training loss explodes: ``rollback`` to the last good state and halve all
            further steps, ``raise``, or ``ignore`` it. The loss is the one that ``training_step`` returns, with manual
            optimization too; without one nothing is noticed.
        small_checkpoints: Whether checkpoints leave out the frozen weights. The module must bring the same base when
            such a one is loaded; its hash is compared.
        adapter: What to adapt in a module that has no adapters of its own; by default ``AdapterConfig()``. Name a new
            head in ``modules_to_save``, or it stays frozen.

    Raises:
        ValueError: An argument is out of range, or the run cannot work: the module's optimizers do not hold the
            adapters, weights are averaged entry by entry, or the run is shorter than ``adapt_every``.
        RuntimeError: Training ended without a single adaptation; or the run diverged, with ``on_divergence="raise"`` or
            after ten rollbacks.
        FloatingPointError: A gradient is not finite, with ``on_nonfinite="raise"``.

    Example:
        >>> trainer = L.Trainer(callbacks=GeoLoRACallback(tau=0.2), logger=False)
    """

    def __init__(
        self,
        tau: float = 0.3,
        budget: int | None = None,
        min_rank: int = 1,
        adapt_every: int | None = None,
        adapt_until: float = 1.0,
        coefficient_steps: int = 0,
        on_nonfinite: OnNonfinite = "skip",
        on_divergence: OnDivergence = "rollback",
        small_checkpoints: bool = False,
        adapter: AdapterConfig | None = None,
    ) -> None:
        # This raises here, and not at the fit.
        RankRule(tau, budget, min_rank, 1 if adapt_every is None else adapt_every, coefficient_steps)
        check_on_nonfinite(on_nonfinite)
        check_on_divergence(on_divergence)
        check_adapt_until(adapt_until)
        self.tau = tau
        self.budget = budget
        self.min_rank = min_rank
        self.adapt_every = adapt_every
        self.adapt_until = adapt_until
        self.coefficient_steps = coefficient_steps
        self.on_nonfinite = on_nonfinite
        self.on_divergence = on_divergence
        self.small_checkpoints = small_checkpoints
        self.adapter = adapter
        self._run: Run | None = None  # the fit that is under way, or else the last one
        self._module: L.LightningModule | None = None  # of the trainer that called last
        self._restored: dict[str, Any] | None = None  # from a checkpoint, until the fit starts

    @property
    def integrator(self) -> RankAdaptiveIntegrator | None:
        """The integrator of the fit that is under way, or of the last one; ``None`` before the first."""
        return self._run.integrator if self._run else None

    @property
    def monitor(self) -> RankMonitor | None:
        """The numbers and pictures of the fit that is under way, or of the last one; ``None`` before the first."""
        return self._run.monitor if self._run else None

    @property
    def _current(self) -> Run:
        if self._run is None:
            raise RuntimeError("GeoLoRACallback follows a fit only: Lightning calls on_fit_start first")
        return self._run

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Put the adapters in before weights are loaded and optimizers are made."""
        check_compatible(trainer, self.small_checkpoints)
        self._module = pl_module
        if stage == "fit":
            check_trainer(trainer)
            fit_bar(trainer.progress_bar_callback)
        if type(trainer.strategy.checkpoint_io) in (TorchCheckpointIO, WholeFiles):  # and not the user's own
            trainer.strategy.checkpoint_io = WholeFiles(
                pl_module, partial(self._describe, pl_module=pl_module), resumes=stage == "fit"
            )
        if not has_adapters(pl_module):
            check_launcher(trainer, pl_module)
            if is_overridden("configure_model", pl_module):
                # Lightning builds such a module only after this hook; its configure_model must be idempotent.
                with (
                    trainer.strategy.tensor_init_context(),
                    trainer.strategy.model_sharded_context(),
                    trainer.precision_plugin.module_init_context(),
                ):
                    pl_module.configure_model()
        if has_adapters(pl_module):
            self._check_origin(pl_module)
        else:
            inject_adapters(pl_module, self.adapter)
            setattr(pl_module, _INJECTED, self.adapter)
        if names := quantised_names(pl_module):  # the same everywhere, and some cannot be sent
            if stage == "fit":
                check_sends_no_codes(trainer)
            leave_to_each_process(pl_module, names)

    def _check_origin(self, pl_module: L.LightningModule) -> None:
        """Refuse a second say in what is adapted, unless an earlier fit has put just these adapters in."""
        if self.adapter is not None and getattr(pl_module, _INJECTED, None) != self.adapter:
            raise ValueError(
                f"{type(pl_module).__name__} has adapters of its own and the callback was given adapter="
                f"{self.adapter}: say what to adapt in one of the two places"
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the run before its first step and start to follow the optimizer."""
        earlier = self._run  # a second fit of the same module with the same trainer goes on
        if not trainer.global_step or (earlier and earlier.integrator.adapters != find_adapters(pl_module)):
            earlier = None
        steps = run_length(trainer)
        adapt_every = self.adapt_every or self._cadence_so_far(earlier) or usual_cadence(steps)
        steps_are_known = pl_module.automatic_optimization and not trainer.fast_dev_run  # type: ignore[attr-defined]
        check_length(steps, adapt_every if steps_are_known else 0, self.adapt_until)
        integrator = RankAdaptiveIntegrator(
            pl_module, self.tau, self.budget, self.min_rank, adapt_every, self.on_nonfinite, self.coefficient_steps
        )
        wrapped = trainer.strategy.model
        if isinstance(wrapped, DistributedDataParallel) and not (
            wrapped.find_unused_parameters or wrapped.static_graph
        ):
            integrator.require_gradients()
        run = Run(pl_module, integrator, optimizer_of_adapters(trainer, integrator), self.on_divergence)
        if earlier:
            run.go_on_from(earlier)
        restored, self._restored = self._restored, None
        if restored is not None:
            run.load_state_dict(restored, self.adapt_every)
        self._run = run
        adapting = self.adapt_until * steps if self.adapt_until < 1 else math.inf
        run.follow(trainer, adapting, last=steps if steps_are_known else math.inf)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Reduce the gradients of the adapters where the strategy does not, before they are clipped."""
        if isinstance(trainer.strategy, ModelParallelStrategy):
            average_unsharded([p for group in optimizer.param_groups for p in group["params"]])

    def _cadence_so_far(self, earlier: Run | None) -> int | None:
        """The cadence of the run that is resumed, or of the earlier fit that goes on."""
        if self._restored is not None:
            return self._restored.get("adapt_every")
        return earlier.integrator.adapt_every if earlier else None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what is adapted, and go to the batch that comes next, where a run is resumed."""
        run = self._current
        run.position.train_starts(trainer)
        if run.guard:
            run.guard.start()
        said = say_what_is_not_plain(pl_module, datamodule_of(pl_module))
        if experts := frozen_experts(pl_module):
            note(experts)
            said.append(experts)
        write_notes(trainer, pl_module, said)
        run.keep_record(trainer)
        if wants_tables(trainer):
            print_summary(*start_summary(pl_module, run.monitor))
        if not trainer.global_step:
            run.monitor.log(trainer, 0)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let a validation leave no trace in the random numbers of the training."""
        if self._run is not None:
            self._run.position.validation_ended()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Go back if the run has diverged; log as often as the trainer, after adaptations, and at an epoch's end."""
        run = self._current
        run.batch_ended(trainer, outputs)
        stepped = not (pl_module.automatic_optimization and accumulates(trainer))
        step = batches_that_stepped(trainer)
        if stepped and (logs_this_batch(trainer) or trainer.is_last_batch or run.monitor.is_due(step)):
            run.monitor.log(trainer, step)
        run.position.batch_ended(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the ranks at the end of an epoch that was cut short."""
        run = self._current
        if run.monitor.shown != _last_step(trainer):
            run.monitor.log(trainer, _last_step(trainer))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave a retracted state behind, or say that there never was an adaptation."""
        self.finish(trainer)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by the trainer
            check_adapted(self._current.integrator)

    def finish(self, trainer: L.Trainer) -> None:
        """Retract what is pending, after the last step of a run; a second call does nothing."""
        run = self._current
        if run.retract_pending():
            run.monitor.log(trainer, _last_step(trainer))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what was found; a run that had ended may have been resumed, without any training."""
        run = self._current
        run.retract_pending()
        if trainer.is_global_zero:
            run.monitor.show(trainer.loggers, _last_step(trainer), at_last=True)
        if wants_tables(trainer):
            print_summary(*end_summary(trainer, pl_module, run.monitor))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stop following the optimizer, and forget what a checkpoint has brought for this run."""
        self._let_go()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stop following the optimizer, and forget what a checkpoint has brought for this run."""
        self._let_go()

    def _let_go(self) -> None:
        self._restored = None
        if self._run is not None:
            self._run.close()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note what the weights do not tell, keep to plain values, and leave the base out, if asked to."""
        self._describe(checkpoint, pl_module)

    def _describe(self, checkpoint: dict[str, Any], pl_module: L.LightningModule) -> None:
        describe_adapters(checkpoint, pl_module)
        if self.small_checkpoints or quantised_names(pl_module):  # which could not be loaded
            base = self._run.base_of(pl_module) if self._run else describe_base(pl_module)
            leave_out_base(checkpoint, pl_module, base)
        keep_plain(checkpoint)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of which this module would make another function; forget what it would have removed."""
        resumes = trainer.state.fn == TrainerFn.FITTING
        check_adapters(checkpoint, pl_module, resumes)
        if resumes:
            check_averaged(checkpoint, trainer)
        forget_other_files(checkpoint, trainer.checkpoint_callbacks)

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse, before the first step, a callback that waits for a metric that there is not."""
        check_monitors(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The integrator's counters and the ranks so far, for a run that is resumed."""
        return self._run.state_dict() if self._run and self._run.module is self._module else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the counters until the fit starts; strategies that shard restore after that."""
        if self._run is not None and self._run.open and state_dict:
            self._run.load_state_dict(state_dict, self.adapt_every)
        else:
            self._restored = state_dict or None


def _last_step(trainer: L.Trainer) -> int:
    """The number that Lightning gives to the loggers for the last batch, once that has been counted."""
    return max(0, batches_that_stepped(trainer) - 1)
