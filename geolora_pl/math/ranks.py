"""Ranks from singular values: by a tolerance, or by a budget of parameters over all adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geolora_pl.math.precision import summing_dtype


@dataclass(frozen=True)
class RankRule:
    """When retractions are due and how they choose the ranks, checked when it is made.

    Args:
        tau: Relative truncation tolerance in the Frobenius norm, in [0, 1).
        budget: Adapter parameters allowed in all, at least 1, or ``None`` for no limit.
        min_rank: Least rank of an adapter, at least 0.
        adapt_every: Optimizer steps from one retraction to the next, at least 1.
        coefficient_steps: Optimizer steps on the coefficients alone, at least 0, in bases that a retraction has
            augmented and not truncated yet.
        keeps_ranks: Whether ranks stay as they are, but for the budget.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> RankRule(tau=0.1, adapt_every=10)
        RankRule(tau=0.1, budget=None, min_rank=1, adapt_every=10, coefficient_steps=0, keeps_ranks=False)
    """

    tau: float
    budget: int | None = None
    min_rank: int = 1
    adapt_every: int = 1
    coefficient_steps: int = 0
    keeps_ranks: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.tau, (int, float)) and 0 <= self.tau < 1):
            raise ValueError(
                f"tau={self.tau!r} must lie in [0, 1): it is the relative part of an update that may be dropped"
            )
        for name, least in (("min_rank", 0), ("adapt_every", 1), ("coefficient_steps", 0)):
            if not _is_whole(value := getattr(self, name), least):
                raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
        if self.budget is not None and not _is_whole(self.budget, 1):
            raise ValueError(
                f"budget={self.budget!r} must be a whole number of adapter parameters, at least 1, or None"
            )


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def resolution(m: int, n: int, dtype: torch.dtype) -> float:
    """Relative size below which a singular value of an (m, n) retraction is only rounding.

    Rounding in inner products of length m grows like its square root. In 656 random retractions with planted dependent
    columns, from 1 x 1 to 2048 x 1024, the largest singular value that should have been zero was
    ``0.53 sqrt(max(m, n)) eps``; the factor 4 leaves room.
    """
    return 4 * math.sqrt(max(m, n)) * torch.finfo(dtype).eps


def ranks_by_tau(sigma: Tensor, tau: float, resolution: float, min_rank: int, max_rank: int) -> Tensor:
    r"""Smallest rank whose dropped tail obeys the relative tolerance.

    .. math:: r = \min \{ r : \lVert \sigma_{r+1:} \rVert_2 \le \tau \lVert \sigma \rVert_2 \}

    and no more than there are singular values above ``resolution * sigma[0]`` (dependent directions); then within
    [min_rank, max_rank].

    Args:
        sigma: (..., k), descending, at least 0.
        tau: In [0, 1).
        resolution: At least 0, from :func:`resolution`.
        min_rank: At least 0.
        max_rank: At most k.

    Returns:
        Ranks (...), int64.

    Example:
        >>> ranks_by_tau(torch.tensor([1.0, 0.5, 0.05]), tau=0.1, resolution=1e-6, min_rank=1, max_rank=3)
        tensor(2)
    """
    wide = sigma.to(summing_dtype(sigma.device))
    relative = wide / wide[..., :1].clamp_min(torch.finfo(wide.dtype).tiny)
    k = sigma.shape[-1]
    tails = wide.new_ones(k, k).tril()  # torch's cumsum of floats is not deterministic on CUDA
    tail = relative.square() @ tails  # tail[i]: energy of sigma[i:]
    within_tau = (tail > tau**2 * tail[..., :1]).sum(-1)
    distinct = (relative > resolution).sum(-1)
    return torch.minimum(within_tau, distinct).clamp(min_rank, max_rank)


def ranks_by_budget(
    sigmas: Sequence[Tensor], ranks: Sequence[Tensor], costs: Sequence[int], budget: int, min_ranks: Sequence[Tensor]
) -> list[Tensor]:
    """Share a budget of parameters among adapters so that the energy kept per parameter is largest.

    The floors are paid first, inside the budget. Then singular triplets are bought in descending order of
    ``sigma^2 / cost``, each while it fits; of one adapter only in order.

    Up to the first that does not fit this is a cumulative sum. From there on all of the cost of that one, and dearer
    ones, are out of reach, for what is left only shrinks. So every round of sums settles one cost at least, and as
    many rounds as there are costs buy what one purchase after the other would, without a look at any number.

    Args:
        sigmas: The singular values (B, k), descending, of each group; in a group a rank of every adapter costs the
            same. Groups may be on different devices.
        ranks: (B,), int64, the most that each adapter may have, at most k, as after :func:`ranks_by_tau`.
        costs: Parameters that one rank of each adapter of the group takes, ``m + n``.
        budget: Parameters in all, at least what the floors cost.
        min_ranks: (B,), int64, the least that each adapter must have, at most its entry of ``ranks``.

    Returns:
        For each group the ranks (B,), int64, on its device.

    Example:
        >>> sigma, most, least = torch.tensor([[3.0, 2.0], [2.5, 0.1]]), torch.tensor([2, 2]), torch.tensor([1, 1])
        >>> ranks_by_budget([sigma], [most], costs=[10], budget=30, min_ranks=[least])
        [tensor([2, 1])]
    """
    device = sigmas[0].device
    energies, offers = [], []
    for sigma, most, least, cost in zip(sigmas, ranks, min_ranks, costs, strict=True):
        rank = torch.arange(sigma.shape[-1], device=sigma.device)
        energies.append((sigma.to(summing_dtype(sigma.device)).square() / cost).flatten().to(device))
        offers.append(((rank >= least[:, None]) & (rank < most[:, None])).flatten().to(device))
    # The sort is stable, so that the energies of one adapter stay in order.
    order = torch.cat(energies).argsort(descending=True, stable=True)
    price = torch.cat([torch.full_like(o, cost, dtype=torch.int64) for o, cost in zip(offers, costs, strict=True)])
    price, kept = price[order], torch.cat(offers)[order]
    budget = min(budget, sum(cost * sigma.numel() for sigma, cost in zip(sigmas, costs, strict=True)))  # fits int64
    left = budget - sum(cost * least.sum().to(device) for least, cost in zip(min_ranks, costs, strict=True))
    for _ in set(costs):
        spent = price * kept
        bought = kept & (spent.cumsum(0) <= left)
        kept = bought | (kept & (price <= left - (spent * bought).sum()))
    of_groups = kept[order.argsort()].split([sigma.numel() for sigma in sigmas])
    return [
        least + chosen.view(sigma.shape).sum(-1).to(sigma.device)
        for sigma, least, chosen in zip(sigmas, min_ranks, of_groups, strict=True)
    ]


def ranks_of_each_by_budget(
    sigmas: Mapping[str, Tensor], ranks: Mapping[str, int], costs: Mapping[str, int], budget: int, min_rank: int = 0
) -> dict[str, int]:
    """The same of single adapters by name, whose ranks are numbers on the host.

    Args:
        sigmas: The singular values (k,), descending, of each adapter.
        ranks: The most that each may have, at most k.
        costs: Parameters that one rank of each takes, ``m + n``.
        budget: Parameters in all.
        min_rank: The least rank of each, or what it has if that is less.

    Example:
        >>> sigmas = {"a": torch.tensor([3.0, 2.0]), "b": torch.tensor([2.5, 0.1])}
        >>> ranks_of_each_by_budget(sigmas, {"a": 2, "b": 2}, {"a": 10, "b": 10}, budget=30)
        {'a': 2, 'b': 1}
    """
    within = ranks_by_budget(
        [sigma.cpu()[None] for sigma in sigmas.values()],
        [torch.tensor([ranks[name]]) for name in sigmas],
        [costs[name] for name in sigmas],
        budget,
        [torch.tensor([min(ranks[name], min_rank)]) for name in sigmas],
    )
    return {name: int(rank) for name, rank in zip(sigmas, within, strict=True)}


def usual_cadence(steps: float) -> int:
    """Optimizer steps from one retraction to the next: 10, or a tenth of a run of less than 100 steps.

    With several steps between two retractions a new direction sums up several gradients before tau judges it.

    Args:
        steps: Optimizer steps of the run; may be infinite.

    Example:
        >>> usual_cadence(5), usual_cadence(50), usual_cadence(5000)
        (1, 5, 10)
    """
    return 10 if steps >= 100 else max(1, int(steps // 10))
