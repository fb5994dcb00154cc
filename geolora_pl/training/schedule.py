"""The schedule of the learning rates: a warm-up, quicker for the head than for the adapters, then half a cosine."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

WARMUP_POWER = 2  # of the step, by which the adapters' learning rate grows
Factor = Callable[[int], float]  # of a learning rate at a step


class GrowingLR(LambdaLR):
    """A LambdaLR that takes in the groups which the optimizer is given later, as by Lightning's ``BaseFinetuning``.

    Such a group goes on from the learning rate that it has, also where a callback changes that once more; torch's own
    LambdaLR refuses it at the next step.

    Args:
        optimizer: The optimizer.
        factors: What the learning rate of each group is multiplied by.
        later: Its ratio from step to step is what the learning rate of a group that comes later is multiplied by.
        taken: Steps that are taken already.
    """

    def __init__(self, optimizer: Optimizer, factors: list[Factor], later: Factor, taken: int = 0) -> None:
        self.later = later
        super().__init__(optimizer, factors, last_epoch=taken - 1)

    def get_lr(self) -> list[float | Tensor]:
        """The learning rates of all groups."""
        rates = super().get_lr()
        before = self.later(max(0, self.last_epoch - 1)) or 1.0  # after the end it is 0, and so are the rates
        ratio = self.later(self.last_epoch) / before
        return rates + [group["lr"] * ratio for group in self.optimizer.param_groups[len(rates) :]]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: numbers, and no function."""
        return {name: value for name, value in super().state_dict().items() if name != "later"}


def warmup_cosine(
    optimizer: Optimizer, warmup: float, total_steps: float, head_warmup: float = 0.02, taken: int = 0
) -> LambdaLR:
    """Warm-up, then half a cosine to zero; in a run without an end, constant after the warm-up.

    The adapters warm up more slowly than the head: over a longer time, and with the square of the step instead of the
    step. A new head is random at first, and the gradients that it sends to the body only distort the pretrained
    features (Kumar et al., ICLR 2022, who train the head alone first). Meanwhile the steps are large enough to find the
    bases of the adapters, for which only their directions matter. A group that the optimizer is given later has no
    warm-up: its own learning rate falls with the cosine from then on.

    Args:
        optimizer: The optimizer whose groups each have their own learning rate scaled; groups with ``adapters: True``
            are the adapters (see ``parameter_groups``); if there are none, all groups warm up like adapters.
        warmup: Length of the adapters' warm-up: a part of the run below 1, a number of steps from 1 on.
        total_steps: Optimizer steps of the run; may be infinite, and then a warm-up given as a part of it is left out.
        head_warmup: Length of the warm-up of all other groups, given in the same way.
        taken: Optimizer steps of the run that are taken already, at least 0.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "adapters": True}], lr=1.0)
        >>> schedule = warmup_cosine(optimizer, warmup=2, total_steps=4)
        >>> schedule.get_last_lr()
        [0.25]
    """
    endless = math.isinf(total_steps)

    def schedule(length: float, power: int) -> Factor:
        steps = round(length) if length >= 1 else 0 if endless else round(length * total_steps)

        def factor(t: int) -> float:
            if t < steps:
                return float(((t + 1) / steps) ** power)
            if endless:
                return 1.0
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (t - steps) / max(1, total_steps - steps))))

        return factor

    marked = [group.get("adapters", False) for group in optimizer.param_groups]
    slow = [mark or not any(marked) for mark in marked]
    for group in optimizer.param_groups:  # torch asks for this where a schedule does not begin at zero
        group.setdefault("initial_lr", deepcopy(group["lr"]))
    factors = [schedule(warmup, WARMUP_POWER) if s else schedule(head_warmup, 1) for s in slow]
    return GrowingLR(optimizer, factors, later=schedule(0, 1), taken=taken)
