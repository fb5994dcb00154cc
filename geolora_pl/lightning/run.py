"""One fit: what it needs while it lasts, and what can be read of it afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning as L
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from geolora_pl.lightning.exact_resume import TrainingPosition
from geolora_pl.lightning.internals import batches_that_stepped
from geolora_pl.lightning.monitor import RankMonitor
from geolora_pl.lightning.run_record import RunRecord
from geolora_pl.storage.checkpoint import describe_base
from geolora_pl.training.divergence import DivergenceGuard, OnDivergence
from geolora_pl.training.following import run_state, take_up
from geolora_pl.training.integrator import RankAdaptiveIntegrator


class Run:
    """The state of one fit, made when it starts and closed when it ends, so that none of it reaches the next fit.

    Attributes:
        module: The module that is trained.
        integrator: It moves the adapters of that module.
        optimizer: The optimizer that holds the adapters.
        monitor: The numbers and pictures of the fit.
        guard: It notices divergence; ``None`` if that is to be ignored.
        position: The place in the data and the random numbers.

    Args:
        module: The module that is trained.
        integrator: It moves the adapters of that module.
        optimizer: The optimizer that holds the adapters.
        on_divergence: What to do when the run diverges.
    """

    def __init__(
        self,
        module: L.LightningModule,
        integrator: RankAdaptiveIntegrator,
        optimizer: Optimizer,
        on_divergence: OnDivergence,
    ) -> None:
        self.module = module
        self.integrator = integrator
        self.optimizer = optimizer
        self.monitor = RankMonitor(integrator)
        self.guard: DivergenceGuard | None = None
        if on_divergence != "ignore":
            self.guard = DivergenceGuard(module, integrator, optimizer, on_divergence == "rollback")
        self.position = TrainingPosition()
        self._record: RunRecord | None = None
        self._last = math.inf
        self._hook: RemovableHandle | None = None
        self._base: dict[str, Any] | None = None

    @property
    def open(self) -> bool:
        """Whether the fit is under way."""
        return self._hook is not None

    def follow(self, trainer: L.Trainer, adapting: float, last: float) -> None:
        """Retract after the optimizer's steps from now on, whenever it is time.

        Args:
            trainer: The trainer of the fit.
            adapting: The batches in which ranks may change, counted as the length of the run is, and not in steps.
            last: The optimizer steps of the whole run, after which all is retracted; infinite where they are unknown.
        """

        def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self.monitor.saw_step(optimizer)
            batch = batches_that_stepped(trainer)
            self.integrator.rank_changes = batch < adapting
            began = self.monitor.clock.now()
            if self.integrator.step(optimizer):
                self.monitor.clock.add(began)
            if trainer.global_step + 1 == last:
                self.retract_pending()  # the last validation and checkpoint are to have the final ranks

        self._last = last
        # A wrapper need not call hooks, but the optimizer inside of it does.
        self._hook = self.integrator.innermost(self.optimizer).register_step_post_hook(after_step)

    def keep_record(self, trainer: L.Trainer) -> None:
        """Write what identifies the fit into its folder, now and when it ends."""
        self._record = RunRecord(trainer, self.module, self.optimizer, self.monitor)

    def batch_ended(self, trainer: L.Trainer, outputs: Any) -> None:
        """Go back if the run has diverged, which shows in the loss that ``training_step`` returned."""
        if self.guard is None:
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        known = loss if isinstance(loss, Tensor) and loss.numel() == 1 else None
        if self.guard.batch_ended(known, trainer.accumulate_grad_batches) and trainer.global_step >= self._last:
            self.retract_pending()  # as after the last step

    def go_on_from(self, earlier: Run) -> None:
        """Take up where an earlier fit of the same trainer and module ended."""
        self.integrator.load_state_dict(earlier.integrator.state_dict())
        self.monitor.load_state_dict(earlier.monitor.state_dict())
        if self.guard and earlier.guard:
            self.guard.load_state_dict(earlier.guard.state_dict())

    def retract_pending(self) -> bool:
        """Fold what is pending into the factors; whether there was anything to do."""
        self.integrator.settle()
        if not self.integrator.unfinished:
            return False
        began = self.monitor.clock.now()
        self.integrator.retract(self.optimizer)
        self.monitor.clock.add(began)
        return True

    def base_of(self, module: L.LightningModule) -> dict[str, Any]:
        """What a small checkpoint says of the base of a module; for the module of this fit it is worked out once."""
        if module is not self.module:
            return describe_base(module)
        self._base = self._base or describe_base(module)
        return self._base

    def close(self) -> None:
        """Stop following the optimizer and watching the trainer; what was found can still be read."""
        self.position.close()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self.integrator.close()
        if self._record is not None:
            self._record.write()
            self._record = None

    def state_dict(self) -> dict[str, Any]:
        """The counters, the ranks so far and the place in the data, for a checkpoint."""
        return {
            **run_state(self.integrator, self.optimizer),
            "monitor": self.monitor.state_dict(),
            "position": self.position.state_dict(),
            "guard": self.guard and self.guard.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], adapt_every: int | None) -> None:
        """Take up what :meth:`state_dict` gave.

        Args:
            state: The state in a checkpoint.
            adapt_every: The cadence that the user asks for; ``None`` for that of the checkpoint.

        Raises:
            ValueError: The checkpoint was made with another kind of optimizer.
        """
        take_up(self.integrator, self.optimizer, state, adapt_every)
        self.monitor.load_state_dict(state["monitor"])
        self.position.load_state_dict(state["position"])
        if self.guard and state.get("guard"):  # not if divergence was ignored so far
            self.guard.load_state_dict(state["guard"])
