"""Tell by the training losses that a run has diverged, and take it back to an earlier state."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from geolora_pl.errors import GeoLoRAWarning
from geolora_pl.training.distributed import average, decides, gathered, processes, this_process
from geolora_pl.training.integrator import RankAdaptiveIntegrator
from geolora_pl.training.snapshot import Snapshot

OnDivergence = Literal["rollback", "raise", "ignore"]
MOST_ROLLBACKS = 10  # after which steps are a thousandth as long, so that their length is not what is wrong

_LEAST = 8  # losses of which a mean is judged
_DIVERGED = 8  # standard deviations by which the losses must have risen: loss by loss, noise has long tails
_UNCLEAR = 3  # standard deviations from which on a rise is not taken for noise either
_OF_LEVEL, _OF_GAIN = 1 / 4, 1 / 3  # of the loss, and of what it had fallen, by which it must have risen
_MEMORY = 0.2  # the weight of the newest mean
_BROKEN = 10  # times the variance so far, of which a larger one is not taken for noise


def check_on_divergence(value: str) -> None:
    """Raise a ValueError unless the value says what to do with a run that has diverged."""
    if value not in get_args(OnDivergence):
        raise ValueError(f"on_divergence={value!r} must be one of {', '.join(get_args(OnDivergence))}")


class Mean(NamedTuple):
    """The mean of some losses, and the variance that the noise between batches gives it."""

    value: float
    variance: float


class Level(NamedTuple):
    """What the losses have come down to.

    Attributes:
        start: The first mean of all.
        reached: The level now: it follows the losses down at once and up slowly.
        variance: The variance of a mean, averaged over the run.
    """

    start: float
    reached: float
    variance: float


def mean_of(losses: Sequence[float]) -> Mean:
    """The mean of losses in their order, infinite if half of them are not finite.

    The largest loss counts only as much as the second: a single batch may be broken where the weights are not. The
    variance comes from the differences of neighbours, so that losses that fall steadily are not taken for noisy ones.

    Example:
        >>> mean_of([1.0, 2.0, 900.0, 1.0]).value
        1.5
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    if len(finite) < 2 or 2 * len(finite) <= len(losses):
        return Mean(math.inf, 0.0)
    *others, second, _ = sorted(finite)
    squares = [(later - earlier) ** 2 for earlier, later in pairwise(finite)]
    return Mean(fmean([*others, second, second]), fmean(squares) / 2 / len(finite))


def rise_of(mean: Mean, level: Level | None) -> float:
    """By how many standard deviations the losses have risen; infinite if they are not finite."""
    if not math.isfinite(mean.value):
        return math.inf
    if level is None or mean.value <= level.reached:
        return 0.0
    noise = math.sqrt(2 * level.variance)  # of a difference of two means
    return (mean.value - level.reached) / noise if noise else math.inf


def has_diverged(mean: Mean, level: Level | None) -> bool:
    """Whether the losses have risen far beyond their noise, and by a part of their level and of what they had fallen.

    Example:
        >>> level = Level(start=2.0, reached=0.5, variance=0.01)
        >>> has_diverged(Mean(0.9, 0.01), level), has_diverged(Mean(1.8, 0.01), level)
        (False, True)
    """
    if level is None or not math.isfinite(mean.value):
        return not math.isfinite(mean.value)
    rise = mean.value - level.reached
    matters = rise > max(_OF_LEVEL * abs(level.reached), _OF_GAIN * (level.start - level.reached))
    return matters and rise_of(mean, level) > _DIVERGED


def followed(level: Level | None, mean: Mean) -> Level:
    """The level after one more mean."""
    if level is None:
        return Level(mean.value, mean.value, mean.variance)
    rise = mean.value - level.reached
    more = min(mean.variance, _BROKEN * level.variance) - level.variance
    return Level(level.start, level.reached + (rise if rise < 0 else _MEMORY * rise), level.variance + _MEMORY * more)


class _Then(NamedTuple):
    """A state of the run, and the level of the losses before it."""

    snapshot: Snapshot
    level: Level | None

    def state_dict(self) -> dict[str, Any]:
        return {"snapshot": self.snapshot.state_dict(), "level": self.level and tuple(self.level)}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> _Then:
        return cls(Snapshot(**state["snapshot"]), _level_of(state["level"]))


class DivergenceGuard:
    """Judges the losses of a run from one retraction to the next, and goes back to a good state if they explode.

    A step only leaves its loss here. It is judged after a retraction, where the host waits for the device anyway. Then
    a copy of the state is made, but the losses that follow must show first that it is good; hence there are two copies,
    a good one and the latest. When the run has diverged, the good one is put back and all further steps are half as
    long. The data go on.

    Where several processes train together they judge the average of their means, so that all decide alike.

    Args:
        model: The model that is trained.
        integrator: The integrator of its adapters; it scales the steps.
        optimizer: The optimizer that holds the adapters.
        goes_back: Whether to go back; if not, a run that has diverged is an error at once.

    Raises:
        RuntimeError: From :meth:`batch_ended`: the run has diverged and must not go back, or not once more.

    Example:
        >>> from geolora_pl import RiemannianAdam, inject_adapters
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = inject_adapters(model)
        >>> integrator, optimizer = RankAdaptiveIntegrator(model), RiemannianAdam(model)
        >>> guard = DivergenceGuard(model, integrator, optimizer)
        >>> guard.start()
        >>> guard.batch_ended(torch.tensor(1.0))  # after the optimizer's step and the integrator's
        False
    """

    def __init__(
        self, model: nn.Module, integrator: RankAdaptiveIntegrator, optimizer: Optimizer, goes_back: bool = True
    ) -> None:
        self._integrator = integrator
        self._where = (model, integrator.innermost(optimizer), integrator)  # that keeps the moments
        self._goes_back = goes_back
        self._losses: list[Tensor] = []
        self._known: list[float] = []  # losses that have been read from the device
        self._batches = 0  # since the last judgement
        self._adaptations = integrator.adaptations  # after the last batch
        self._level: Level | None = None
        self._good: _Then | None = None
        self._latest: _Then | None = None
        self._trained = self._count_of_trained()

    def start(self) -> None:
        """Call before the first step, with everything in its place: take the state at the start for a good one."""
        if self._goes_back and self._good is None:
            self._good = self._latest = _Then(Snapshot.take(*self._where), self._level)

    def batch_ended(self, loss: Tensor | None, batches_per_step: int = 1) -> bool:
        """Call after every batch, and after the optimizer's step if there was one.

        Args:
            loss: The loss of the batch, one number on the device; ``None`` if it is not known.
            batches_per_step: How many batches are accumulated for a step.

        Returns:
            Whether the run went back.
        """
        self._take_in_what_is_new()
        self._batches += 1
        if loss is not None:
            self._losses.append(loss)
        retracted = self._integrator.adaptations > self._adaptations
        self._adaptations = self._integrator.adaptations
        # A run in which every step is skipped comes to no retraction any more.
        cadence = max(self._integrator.adapt_every, self._integrator.rule.coefficient_steps)
        stuck = self._batches >= 2 * (_LEAST + cadence * batches_per_step)
        if self._batches < _LEAST or not (retracted or stuck):
            return False
        self._batches = 0
        mean = self._mean()
        if mean is None:
            return False
        if has_diverged(mean, self._level):
            self._go_back(mean)
            return True
        if self._goes_back and rise_of(mean, self._level) <= _UNCLEAR:
            self._good = self._latest
        self._level = followed(self._level, mean)
        if self._goes_back:
            self._latest = _Then(Snapshot.take(*self._where), self._level)
        return False

    def _count_of_trained(self) -> int:
        _, optimizer, _ = self._where
        return sum(len(group["params"]) for group in optimizer.param_groups)

    def _take_in_what_is_new(self) -> None:
        """Complete the copies, where a callback has thawed weights and given them to the optimizer."""
        if self._good is None or self._latest is None or self._trained == self._count_of_trained():
            return
        self._trained = self._count_of_trained()
        model, optimizer, _ = self._where
        good, latest = (
            then._replace(snapshot=then.snapshot.completed(model, optimizer)) for then in (self._good, self._latest)
        )
        self._latest = good if self._latest is self._good else latest
        self._good = good

    def _mean(self) -> Mean | None:
        """The mean of the losses since the last judgement, over all processes; ``None`` if there are too few."""
        losses, self._known = self._on_host(), []
        enough = len(losses) >= _LEAST // 2
        mine = mean_of(losses) if enough else Mean(0.0, 0.0)
        value, variance, share = average(
            [*mine, float(enough)], next(iter(self._integrator.adapters.values())).U.device
        )
        return Mean(value / share, variance / share**2 / processes()) if share else None

    def _on_host(self) -> list[float]:
        if self._losses:
            self._known += torch.stack([loss.detach().reshape(()) for loss in self._losses]).tolist()
            self._losses = []
        return self._known

    def _go_back(self, mean: Mean) -> None:
        step, (_, optimizer, integrator) = self._integrator.total_steps, self._where
        level = "" if self._level is None else f" from {self._level.reached:.4g}"
        what = f"the training loss rose{level} to {mean.value:.4g} by step {step}"
        lrs = ", ".join(f"{float(group['lr']) * 0.5**integrator.rollbacks:.3g}" for group in optimizer.param_groups)
        if self._good is None:
            raise RuntimeError(
                f"the run has diverged: {what}, with the learning rates {lrs}; lower lr by a factor of 3, lengthen the "
                "warm-up, clip the gradients, or set on_divergence='rollback'"
            )
        if integrator.rollbacks == MOST_ROLLBACKS:
            raise RuntimeError(
                f"the run has diverged again after {MOST_ROLLBACKS} rollbacks: {what}, with the learning rates {lrs}; "
                "look at the data and the loss, lower lr, or set on_divergence='ignore' if the loss is meant to rise"
            )
        good, self._level = self._good
        good.put_back(*self._where)
        self._latest = self._good
        if decides():
            warnings.warn(
                f"{what}: the run went back to its state after step {good.integrator['total_steps']}, and from now on "
                f"every step is {0.5**integrator.rollbacks:g} times as long as scheduled; rollbacks counts this. Lower "
                "lr if it happens often",
                GeoLoRAWarning,
                stacklevel=3,
            )

    def state_dict(self) -> dict[str, Any]:
        """Losses, level and both copies, for a run that is resumed; every process must call this."""
        losses = gathered(self._on_host())
        good = self._good and self._good.state_dict()
        latest = good if self._latest is self._good else self._latest and self._latest.state_dict()
        return {
            "losses": [list(of_process) for of_process in losses],
            "batches": self._batches,
            "adaptations": self._adaptations,
            "level": self._level and tuple(self._level),
            "good": good,
            "latest": latest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave; another number of processes starts with no losses."""
        same = len(state["losses"]) == processes()
        self._known, self._losses = list(state["losses"][this_process()]) if same else [], []
        self._batches, self._adaptations = state["batches"] if same else 0, state["adaptations"]
        self._level = _level_of(state["level"])
        if self._goes_back and state["good"]:
            self._good = self._latest = _Then.of(state["good"])
            if state["latest"] is not state["good"]:  # a file keeps that the two are one
                self._latest = _Then.of(state["latest"])


def _level_of(values: Sequence[float] | None) -> Level | None:
    return Level(*values) if values else None
