"""The rank-adaptive integrator: after the optimizer's step, retract, truncate, transport."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from geolora_pl.adapters.base import GeoLoRALayer
from geolora_pl.adapters.inject import adapter_parameters, find_adapters
from geolora_pl.errors import GeoLoRAWarning
from geolora_pl.math.precision import exact_products
from geolora_pl.math.ranks import RankRule
from geolora_pl.training.binding import Binding
from geolora_pl.training.coefficients import restrict_increments
from geolora_pl.training.distributed import is_sharded
from geolora_pl.training.internals import foreach_copy_, foreach_zero_
from geolora_pl.training.moments import Moved, transport_moments
from geolora_pl.training.offers import Retraction, stack
from geolora_pl.training.plan import GroupPlan, Plan, plan_retraction
from geolora_pl.training.steps import OnNonfinite, StepWatch
from geolora_pl.training.threads import one_thread
from geolora_pl.training.uninterrupted import finish

_COUNTS = ("total_steps", "adaptations", "rollbacks")
_STATE = ("rank_changes", "steps", *_COUNTS, "truncation_error", "_on_trial", "_augmented")


class RankAdaptiveIntegrator:
    r"""Move the factors of all adapters after the optimizer's step (GeoLoRA, Algorithm 1, steps 3 to 5).

    Every ``adapt_every`` optimizer steps, and after 1, 2, 4, ... steps at the start, the pending tangent step of each
    adapter is folded into its factors: augment
    the bases, take the SVD of the small core, choose the rank, rotate. K and L return to zero, and the optimizer's
    moments are carried to the new bases. Between two such steps the increments stay pending; they are part of the
    forward and of the state.

    ``weight_decay`` of the parameter groups that hold K and L is decoupled decay of the update: the optimizer decays
    the pending increments, and the integrator multiplies S by ``1 - lr * weight_decay`` for every step, with the lr of
    that step, at the retraction.

    A step whose gradients are not all finite is skipped whole, head and moments included (or refused, with
    ``on_nonfinite="raise"``): just before the optimizer's step the gradients of all its parameters are set to
    ``None``, or on a GPU :class:`~geolora_pl.RiemannianAdam` leaves it out by itself. The integrator sees the steps of
    any torch optimizer that holds its adapters, from the first one on, without being told. An integrator that is made
    for adapters that have one already takes its place.

    Where several processes train together (``torch.distributed`` is initialised), rank 0 decides every retraction and
    sends ranks and factors to the others in one message, so that all stay equal to the bit. They must hold the same
    adapters, and gradients that are already reduced, as with DDP.

    ``coefficient_steps`` is the practical schedule of the authors' code: a retraction only augments, so that ranks
    double; so many optimizer steps train S alone; then ``tau`` truncates, and ``adapt_every`` steps of K and L follow.
    Once ranks may change no more, S alone is trained.

    The defaults are those of Algorithm 1; :class:`~geolora_pl.GeoLoRACallback` has the ones that measured best.

    Attributes:
        adapters: The adapters by name.
        rule: When a retraction is due and how it chooses the ranks.
        steps: Optimizer steps since the last retraction.
        total_steps: Optimizer steps in all.
        adaptations: Retractions so far.
        rollbacks: How many times the run went back to an earlier state; every time the optimizer's steps are halved.
        truncation_error: Relative Frobenius norm of what the last retraction dropped, over all adapters that it moved.

    Args:
        model: A model with adapters.
        tau: Relative truncation tolerance in the Frobenius norm, in [0, 1): the dropped tail of an adapter is at most
            ``tau`` times the norm of its update, unless ``max_rank`` or the budget binds.
        budget: Adapter parameters allowed in all, ``sum(rank * (in + out))``, or ``None`` for no limit but
            ``max_rank``.
        min_rank: Least rank of an adapter, at least 0. An adapter at rank 0 is pruned: only its probes have a gradient,
            and they can bring it back. Without probes it stays pruned.
        adapt_every: Optimizer steps from one retraction to the next, at least 1; the first ones come sooner, after 1,
            2, 4, ... steps, so that the bases of the start, which are random, do not decide which ranks are found.
        on_nonfinite: ``skip`` a step whose gradients are not all finite, or ``raise``.
        coefficient_steps: Optimizer steps on the coefficients alone between an augmentation and its truncation, at
            least 0; with 0 one retraction does both. It needs adapters without probes.

    Raises:
        ValueError: An argument is out of range, the model has no adapters, the budget is below what ``min_rank``
            asks for, or ``coefficient_steps`` was asked for with probes or sharded factors.
        FloatingPointError: From the optimizer's step with ``on_nonfinite="raise"``; nothing has changed then.

    Example:
        >>> from geolora_pl import inject_adapters
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> adapters = inject_adapters(model)
        >>> integrator = RankAdaptiveIntegrator(model, tau=0.1)
        >>> optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        >>> model(torch.randn(4, 8)).square().mean().backward()
        >>> optimizer.step()
        >>> integrator.step(optimizer)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        tau: float = 0.1,
        budget: int | None = None,
        min_rank: int = 1,
        adapt_every: int = 1,
        on_nonfinite: OnNonfinite = "skip",
        coefficient_steps: int = 0,
    ) -> None:
        self.rule = RankRule(tau, budget, min_rank, adapt_every, coefficient_steps)
        self.adapters = find_adapters(model)
        if not self.adapters:
            raise ValueError("the model has no adapters: inject_adapters(model, config) first")
        for layer in self.adapters.values():
            layer.read_rank()  # factors may have been written to, as by a wrapper that sends them from another process
        _check_floors(self.rule, self.adapters)
        _check_schedule(self.rule, self.adapters)
        self.steps = 0
        self.total_steps = 0
        self.adaptations = 0
        self.rollbacks = 0
        self.truncation_error = 0.0
        self._augmented = False  # whether the last retraction only augmented, and the next is to truncate
        self._on_trial = False  # whether the last retraction may have taken in directions that nothing has judged yet
        self._reset_keys: set[str] = set()  # keys of the optimizer's state that a warning has named
        self._binding = Binding(self.adapters)
        self._watch = StepWatch(model, self.adapters, self._binding, on_nonfinite)
        self._set_rule(self.rule)

    @property
    def adapt_every(self) -> int:
        """Optimizer steps from one retraction to the next; may be set, as a run that is resumed keeps its own."""
        return self.rule.adapt_every

    @adapt_every.setter
    def adapt_every(self, steps: int) -> None:
        self._set_rule(replace(self.rule, adapt_every=steps))

    @property
    def rank_changes(self) -> bool:
        """Whether retractions may change ranks; set it to ``False`` to keep every rank as it is from then on."""
        return not self.rule.keeps_ranks

    @rank_changes.setter
    def rank_changes(self, change: bool) -> None:
        if change != self.rank_changes:
            self._set_rule(replace(self.rule, keeps_ranks=not change))

    def _set_rule(self, rule: RankRule) -> None:
        """Take a rule, which files that are written between two retractions follow as well."""
        self.rule = rule
        for layer in self.adapters.values():
            layer.rule = rule

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that were skipped because a gradient was not finite."""
        return self._watch.skipped_steps

    def gradient_norm(self) -> float | None:
        """The norm of all gradients of the last step; ``None`` if nobody knows; waits for the device."""
        squares = self._watch.squares
        return None if squares is None else float(squares.sum().sqrt())

    @property
    def unfinished(self) -> bool:
        """Whether :meth:`retract` has anything to do: increments are pending, or new directions are not judged yet."""
        return self.steps > 0 or self._on_trial or self._augmented

    def ranks(self) -> dict[str, int]:
        """The live rank of every adapter by name."""
        return {name: layer.rank for name, layer in self.adapters.items()}

    def adapter_parameters(self) -> int:
        """Active adapter parameters, ``sum(rank * (in + out))``."""
        return adapter_parameters(self.adapters)

    def step(self, optimizer: Optimizer) -> bool:
        """Call after ``optimizer.step()``: retract when it is time.

        Args:
            optimizer: The optimizer that just stepped; its moments are carried along.

        Returns:
            Whether the factors were retracted. A step that was skipped does not count.

        Raises:
            ValueError: The optimizer does not hold K and L of the adapters, or trains U, S or V; or another integrator
                was made for them since.
        """
        self.check_optimizer(optimizer)
        if self._watch.nesting.inner:
            return False  # a hook has called this at the end of a super().step(), before the step is over
        new_steps, skipped = self._watch.take()
        seen = new_steps or skipped or (self.steps and isinstance(self.innermost(optimizer), Optimizer))
        if not seen and self._anything_pending():
            new_steps = 1  # increments written by hand, or by an optimizer that is not one of torch's
        self.steps += new_steps
        self.total_steps += new_steps
        if new_steps and self._watch.coefficients_alone:
            restrict_increments(self.adapters.values())
        if self.steps >= self._interval():
            self.settle()
        if self.steps < self._interval():
            return False
        augments = self.rule.coefficient_steps > 0 and self.rank_changes and not self._augmented
        self._retract(optimizer, admits=self.rank_changes, augments=augments)
        return True

    def _interval(self) -> int:
        """Steps from the last retraction to the next: at first as many as were taken before the last one."""
        if self._watch.coefficients_alone:
            return self.rule.coefficient_steps
        return min(self.adapt_every, max(1, self.total_steps - self.steps))

    def settle(self) -> None:
        """Subtract the steps that were counted, but that a device has skipped; waits for the device to know them."""
        skipped = self._watch.settle()
        self.steps -= skipped
        self.total_steps -= skipped

    def require_gradients(self) -> None:
        """Raise from now on where an adapter gets no gradient: other processes would wait for it."""
        self._watch.every_adapter_needs_a_gradient = True

    def close(self) -> None:
        """Stop watching the optimizer; what was found can still be read."""
        self._watch.close()

    def is_trained_by(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer holds K or L of any adapter."""
        return self._binding.trains_any(optimizer)

    def innermost(self, optimizer: Optimizer) -> Optimizer:
        """The optimizer that moves the adapters, inside of a wrapper such as SAM; its steps are those that count."""
        return self._binding.innermost(optimizer)

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Raise a ValueError unless the optimizer suits and holds K and L of every adapter that is trained."""
        self._binding.check(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Counters, pending decay, and the rule for exports; factors and ranks are in the model's own state."""
        self.settle()
        counters = {name: getattr(self, name) for name in _STATE}
        return {**counters, "rule": asdict(self.rule), **self._watch.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        for name in _STATE:
            # Older states do not have all: without probes nothing was on trial, and no run had gone back.
            setattr(self, name, state.get(name, getattr(self, name)))
        self._watch.load_state_dict(state)
        self._watch.coefficients_alone &= self.rule.coefficient_steps > 0  # a resumed run may have another schedule
        self._watch.lr_factor = 0.5**self.rollbacks

    def go_back(self, state: Mapping[str, Any]) -> None:
        """Take up the state of an earlier time, whose factors are in the model again, and halve all further steps.

        What counts for the whole run goes on: steps, adaptations, skipped steps, and whether ranks may change. Learning
        rates are halved only while the optimizer steps, so that a scheduler neither sees nor undoes it.

        Args:
            state: What :meth:`state_dict` returned at that time.
        """
        counts = {name: getattr(self, name) for name in (*_COUNTS, "rank_changes")}
        skipped = {"skipped_steps": self.skipped_steps}
        self.load_state_dict({**state, **counts, **skipped, "rollbacks": self.rollbacks + 1})
        for layer in self.adapters.values():
            layer.read_rank()

    def retract(self, optimizer: Optimizer | None = None) -> None:
        """Fold every pending increment into its factors now, whatever the cadence.

        No direction is taken in that was not trained yet, and probes are left out until the next retraction. An adapter
        with nothing pending keeps its live factors to the bit, for a relative ``tau`` would erode it; only directions
        that never took a step are dropped, and the budget may take ranks from it.

        Args:
            optimizer: Whose moments are carried along; ``None`` if there is none any more.
        """
        self._retract(optimizer, admits=False)

    @torch.no_grad()
    def _retract(self, optimizer: Optimizer | None, admits: bool, augments: bool = False) -> None:
        self.settle()
        what = Retraction(
            self.rule,
            self.rank_changes or self._augmented,  # an augmentation never stays without its truncation
            admits,
            seed=self.adaptations,
            augments=augments,
            judges_all=self._augmented,
        )
        device = next(iter(self.adapters.values())).U.device
        with exact_products(device), one_thread(device):
            self._carry_out(plan_retraction(self.adapters, self._watch.decay, what), optimizer)
        if self._on_trial and not admits:
            for layer in self.adapters.values():  # also those that did not move
                for factor in (layer.U, layer.V, layer.K, layer.L):
                    factor[:, : layer.probes] = 0
        self.steps = 0
        self.adaptations += 1
        self._on_trial = admits and any(layer.probes for layer in self.adapters.values())
        self._augmented = augments
        self._watch.coefficients_alone = self.rule.coefficient_steps > 0 and (augments or not self.rank_changes)

    def _carry_out(self, plan: Plan, optimizer: Optimizer | None) -> None:
        ranks, self.truncation_error = plan.on_host()
        try:
            for group in plan.groups:
                self._move(group, max(ranks[name] for name in group.names), optimizer)
            for name, rank in ranks.items():
                self.adapters[name].rank = rank
        except BaseException:  # keep the ranks true to the factors, however many of them have moved
            for layer in self.adapters.values():
                layer.read_rank()
            raise

    def _anything_pending(self) -> bool:
        """Whether K or L hold a step; what probes remember from the last retraction, in K, is none."""
        return any(
            bool(increments.any())
            for layer in self.adapters.values()
            for increments in (layer.K[:, layer.probes :], layer.L)
        )

    def _move(self, group: GroupPlan, rank: int, optimizer: Optimizer | None) -> None:
        """Write the truncated factors of adapters of one shape and carry their moments along, all or nothing."""
        layers = [self.adapters[name] for name in group.names]
        columns = max(rank, *(layer.rank for layer in layers))
        U, S, V = (stack(self.adapters, group.names, factor, columns) for factor in "USV")
        moves = group.moves[:, None, None]
        U_new, S_new, V_new = (
            torch.where(moves, new[..., : old.shape[-1]], old)
            for new, old in ((group.U, U), (torch.diag_embed(group.sigma[:, :columns]), S), (group.V, V))
        )
        moved: Moved = []
        if optimizer is not None:
            innermost = self._binding.innermost(optimizer)
            moved, unknown = transport_moments(innermost, layers, (U, V), (U_new, V_new), group.moves)
            self._report_reset(unknown)
        width, probes = U.shape[-1], layers[0].probes
        remembered = torch.stack([layer.K[:, :probes] for layer in layers])
        remembered = torch.where(moves, group.U[..., :probes] * group.gathered[:, None], remembered)

        def write() -> None:
            # The columns beyond were zero and stay so.
            foreach_copy_([layer.U[:, :width] for layer in layers], list(U_new.unbind()))
            foreach_copy_([layer.S[:columns, :columns] for layer in layers], list(S_new.unbind()))
            foreach_copy_([layer.V[:, :width] for layer in layers], list(V_new.unbind()))
            foreach_zero_([factor for layer in layers for factor in (layer.K, layer.L)])
            foreach_copy_([layer.K[:, :probes] for layer in layers], list(remembered.unbind()))
            for state, after in moved:
                foreach_copy_(state, after)
            self._watch.forget_decay(group.names)

        finish(write)

    def _report_reset(self, keys: set[str]) -> None:
        if new := keys - self._reset_keys:
            self._reset_keys |= new
            warnings.warn(
                f"the optimizer's state {', '.join(sorted(new))} has no known rule for moving with the bases: at a "
                "retraction it is averaged over the columns where it is nowhere negative, and set to zero elsewhere; "
                "check_optimizer of geolora_pl.testing shows whether the optimizer bears that",
                GeoLoRAWarning,
                stacklevel=2,
            )


def _check_schedule(rule: RankRule, adapters: Mapping[str, GeoLoRALayer]) -> None:
    """Raise a ValueError if steps on the coefficients alone cannot be taken."""
    if not rule.coefficient_steps:
        return
    asked = f"coefficient_steps={rule.coefficient_steps}"
    if any(layer.probes for layer in adapters.values()):
        raise ValueError(
            f"{asked} judges new directions by their coefficients, and probes judge them by their gradients: set "
            "AdapterConfig(probes=0), or coefficient_steps=0"
        )
    if any(is_sharded(layer.K) for layer in adapters.values()):
        raise ValueError(f"{asked} needs whole factors, and here they are sharded: set coefficient_steps=0, or use DDP")


def _check_floors(rule: RankRule, adapters: Mapping[str, GeoLoRALayer]) -> None:
    """Raise a ValueError if the adapters cannot have the ranks that ``min_rank`` asks for."""
    if rule.min_rank > (largest := max(layer.max_rank for layer in adapters.values())):
        raise ValueError(f"min_rank={rule.min_rank} is above the largest max_rank, {largest}: lower it")
    least = sum(
        min(rule.min_rank, layer.max_rank) * (layer.in_features + layer.out_features) for layer in adapters.values()
    )
    if rule.budget is not None and rule.budget < least:
        raise ValueError(
            f"budget={rule.budget} is below the floor of {least} parameters that min_rank asks for: raise budget or "
            "lower min_rank"
        )
