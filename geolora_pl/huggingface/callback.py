"""The callback for the Trainer of transformers, and so for those of TRL: moves the adapters after the optimizer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from geolora_pl.adapters.experts import frozen_experts
from geolora_pl.adapters.inject import find_adapters
from geolora_pl.adapters.savers import let_save_pretrained, warn_at_save_pretrained
from geolora_pl.math.ranks import RankRule, usual_cadence
from geolora_pl.report.metrics import ADAPTER_PARAMS, MEAN_RANK, SKIPPED_STEPS
from geolora_pl.training.following import check_adapt_until, check_adapted, check_length, run_state, take_up
from geolora_pl.training.integrator import RankAdaptiveIntegrator
from geolora_pl.training.steps import OnNonfinite, check_on_nonfinite

_STATE_FILE = "trainer_state.json"  # of a checkpoint of the Trainer


class GeoLoRATrainerCallback(TrainerCallback, ExportableState):
    """Train rank-adaptive adapters with the Trainer of transformers, or one of TRL.

    Put the adapters into the model first (``inject_adapters``), since the Trainer makes its optimizer from what
    requires gradients; any optimizer of the Adam family or SGD will do, or ``optimizers=(RiemannianAdam(model),
    None)``. The Trainer's checkpoints hold the adapters, and in ``trainer_state.json`` the counters of this callback,
    so that a run that is resumed goes on as if it had not stopped. To what the Trainer prints and keeps in its history
    the callback adds ``geolora/mean_rank``, ``geolora/adapter_params`` and ``geolora/skipped_steps``.

    The losses of single steps do not reach a callback, so that divergence is not noticed here.

    Args:
        tau: Relative truncation tolerance, in [0, 1). Larger means smaller ranks.
        budget: Adapter parameters allowed in all, at least 1, or ``None``.
        min_rank: Least rank of an adapter, at least 0.
        adapt_every: Optimizer steps from one retraction to the next, at least 1; by default as in
            :class:`~geolora_pl.GeoLoRACallback`.
        adapt_until: The part of the run in which ranks may change, in (0, 1].
        coefficient_steps: Optimizer steps that train the coefficients alone, at least 0, after an augmentation.
        on_nonfinite: What a gradient that is not finite does: ``skip`` the step, or ``raise``.

    Attributes:
        integrator: That of the training that is under way, or of the last one; ``None`` before the first.

    Raises:
        ValueError: An argument is out of range; or, when the training starts, the model has no adapters, the optimizer
            does not hold them, the run is shorter than ``adapt_every``, or the checkpoint was made without this
            callback or with another optimizer.
        RuntimeError: Training ended without a single adaptation.
        FloatingPointError: A gradient is not finite, with ``on_nonfinite="raise"``.

    Example:
        >>> callback = GeoLoRATrainerCallback(tau=0.2)  # for Trainer(model, callbacks=[callback], ...)
        >>> callback.integrator is None
        True
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
    ) -> None:
        RankRule(tau, budget, min_rank, 1 if adapt_every is None else adapt_every, coefficient_steps)
        check_on_nonfinite(on_nonfinite)
        check_adapt_until(adapt_until)
        self.tau = tau
        self.budget = budget
        self.min_rank = min_rank
        self.adapt_every = adapt_every
        self.adapt_until = adapt_until
        self.coefficient_steps = coefficient_steps
        self.on_nonfinite = on_nonfinite
        self.integrator: RankAdaptiveIntegrator | None = None
        self._optimizer: Optimizer | None = None  # the one that moves the adapters, inside of accelerate's wrapper

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the run before its first step, and take up where the checkpoint was made."""
        model: nn.Module = kwargs["model"]
        saved = self._saved_in(state) if state.global_step else None
        adapt_every = self.adapt_every or (saved["adapt_every"] if saved else usual_cadence(state.max_steps))
        check_length(state.max_steps, adapt_every, self.adapt_until)
        self.integrator = RankAdaptiveIntegrator(
            model, self.tau, self.budget, self.min_rank, adapt_every, self.on_nonfinite, self.coefficient_steps
        )
        self.integrator.check_optimizer(kwargs["optimizer"])
        self._optimizer = self.integrator.innermost(kwargs["optimizer"])
        if saved:
            take_up(self.integrator, self._optimizer, saved, self.adapt_every)
        if state.is_world_process_zero and (experts := frozen_experts(model)):
            logging.getLogger(__name__).warning(experts)
        let_save_pretrained(model)  # the checkpoints of the Trainer are loaded into a model with adapters

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Retract, whenever it is time."""
        integrator, optimizer = self._current
        integrator.rank_changes = state.global_step < self.adapt_until * state.max_steps
        integrator.step(optimizer)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After the last step retract what is pending: the last evaluation and checkpoint have the final ranks."""
        if state.global_step >= state.max_steps or control.should_training_stop:
            self._retract_pending()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the ranks to what the Trainer prints and keeps."""
        if self.integrator is None or find_adapters(kwargs["model"]) != self.integrator.adapters:
            return  # an evaluation before any training, or of another model
        ranks = self.integrator.ranks().values()
        numbers = {
            MEAN_RANK: sum(ranks) / len(ranks),
            ADAPTER_PARAMS: self.integrator.adapter_parameters(),
            SKIPPED_STEPS: self.integrator.skipped_steps,
        }
        for seen in (logs, *state.log_history[-1:]):
            if seen is not None:
                seen.update(numbers)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave a retracted model behind, also where the best checkpoint has been loaded, and stop to follow."""
        integrator, _ = self._current
        best = Path(state.best_model_checkpoint or "", _STATE_FILE)
        if args.load_best_model_at_end and state.best_model_checkpoint and best.is_file():
            integrator.load_state_dict(self._saved_in(TrainerState.load_from_json(str(best)))["integrator"])
        self._retract_pending()
        integrator.close()
        warn_at_save_pretrained(kwargs["model"])
        check_adapted(integrator)

    def state(self) -> dict[str, Any]:
        """The settings, and the counters of the run, for ``trainer_state.json``."""
        names = ("tau", "budget", "min_rank", "adapt_every", "adapt_until", "coefficient_steps", "on_nonfinite")
        run = None if self.integrator is None else run_state(*self._current)
        return {"args": {name: getattr(self, name) for name in names}, "attributes": {}, "run": run}

    def _saved_in(self, state: TrainerState) -> dict[str, Any]:
        """What a checkpoint holds of the run beside weights and optimizer.

        Raises:
            ValueError: It has nothing of this callback, or there were two.
        """
        callbacks: Any = state.stateful_callbacks  # a dictionary by now, whatever its annotation says
        name = type(self).__name__  # by which the Trainer keeps it
        saved = callbacks.get(name)
        if not isinstance(saved, dict) or not saved.get("run"):
            raise ValueError(
                f"step {state.global_step} of the checkpoint was not made with one {name}, so that its counters are "
                "missing: resume with the callbacks that the run began with, or start a new run from the weights"
            )
        run: dict[str, Any] = saved["run"]
        return run

    @property
    def _current(self) -> tuple[RankAdaptiveIntegrator, Optimizer]:
        if self.integrator is None or self._optimizer is None:
            raise RuntimeError("GeoLoRATrainerCallback follows a training only: the Trainer calls on_train_begin first")
        return self.integrator, self._optimizer

    def _retract_pending(self) -> None:
        integrator, optimizer = self._current
        integrator.settle()
        if integrator.unfinished:
            integrator.retract(optimizer)
