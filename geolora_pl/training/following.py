"""What a callback does with the integrator, whatever the trainer: checks of a run, and what it is resumed by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from geolora_pl.training.integrator import RankAdaptiveIntegrator


def check_adapt_until(adapt_until: float) -> None:
    """Raise a ValueError unless ``adapt_until`` is a part of a run."""
    if not 0 < adapt_until <= 1:
        raise ValueError(f"adapt_until={adapt_until!r} must lie in (0, 1]: it is a part of the run")


def check_length(steps: float, adapt_every: int, adapt_until: float) -> None:
    """Refuse a run in which the ranks would never change, or in which nobody knows when they stop changing.

    Args:
        steps: The optimizer steps of the run; infinite where they are unknown, 0 where nothing is left to train.
        adapt_every: The cadence, or 0 where steps cannot be counted beforehand.
        adapt_until: The part of the run in which ranks may change.

    Raises:
        ValueError: The run is shorter than the cadence, or a part of it was asked for and it has no end.
    """
    if 0 < steps < adapt_every:
        raise ValueError(
            f"adapt_every={adapt_every} is longer than the run of {steps} optimizer steps: lower it to at most {steps}"
        )
    if adapt_until < 1 and math.isinf(steps):
        raise ValueError(f"adapt_until={adapt_until} is a part of a run without an end: set max_steps or max_epochs")


def check_adapted(integrator: RankAdaptiveIntegrator) -> None:
    """Raise a RuntimeError if a run has ended without a single retraction."""
    if integrator.adaptations == 0:
        raise RuntimeError(
            "training ended without one adaptation of the ranks: no optimizer step was taken, and "
            f"{integrator.skipped_steps} were skipped for gradients that are not finite; a step in which no "
            "adapter has a gradient does not count"
        )


def run_state(integrator: RankAdaptiveIntegrator, optimizer: Optimizer) -> dict[str, Any]:
    """What a checkpoint must hold of a run beside weights and the optimizer's state; numbers and names only."""
    return {
        "integrator": integrator.state_dict(),
        "optimizer": type(optimizer).__name__,
        "adapt_every": integrator.adapt_every,
    }


def take_up(
    integrator: RankAdaptiveIntegrator, optimizer: Optimizer, state: Mapping[str, Any], adapt_every: int | None
) -> None:
    """Go on where a checkpoint was made, once the weights of it are in the model.

    Args:
        integrator: Of the run that is resumed.
        optimizer: Its optimizer.
        state: What :func:`run_state` gave for the checkpoint.
        adapt_every: The cadence that the user asks for; ``None`` for that of the checkpoint.

    Raises:
        ValueError: The checkpoint was made with another kind of optimizer.
    """
    ours, theirs = type(optimizer).__name__, state["optimizer"]
    if ours != theirs:
        raise ValueError(
            f"the checkpoint was made with the optimizer {theirs} and this run has {ours}, which cannot take up "
            "its state: use the same one, or start a new run from the weights"
        )
    for layer in integrator.adapters.values():
        layer.read_rank()  # strategies that shard load the factors only after the fit has started
    integrator.adapt_every = adapt_every or state["adapt_every"]
    integrator.load_state_dict(state["integrator"])
