"""What a retraction does, worked out before anything is changed: where every adapter goes, and at which rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geolora_pl import functional
from geolora_pl.adapters import FACTORS, GeoLoRALayer
from geolora_pl.agreement import broadcast_packed, decides, processes

Adapters = Mapping[str, GeoLoRALayer]


@dataclass(frozen=True)
class Plan:
    """A retraction of all adapters.

    Attributes:
        groups: Names of the adapters of one shape each.
        steps: For each group, the point plus the pending step of its adapters, decomposed; no more singular vectors
            than any of them may keep.
        ranks: New rank of every adapter that moves; one with nothing pending keeps its factors to the bit.
        truncation_error: Relative Frobenius norm of what is dropped, over all adapters.
    """

    groups: Sequence[Sequence[str]]
    steps: Sequence[functional.Decomposition]
    ranks: Mapping[str, int]
    truncation_error: float


def plan_retraction(
    adapters: Adapters, decay: Mapping[str, float], tau: float | None, budget: int | None, min_rank: int
) -> Plan:
    """Plan a retraction; where several processes train together, all have the plan of rank 0, from one message.

    Args:
        adapters: By name.
        decay: Factor of S of each adapter, in [0, 1].
        tau: Relative truncation tolerance, or ``None`` to leave every rank as it is.
        budget: Adapter parameters allowed in all, or ``None``.
        min_rank: Least rank, at least 0.
    """
    groups = _group_by_shape(adapters)
    if processes() == 1:
        return _decide(adapters, groups, decay, tau, budget, min_rank)
    if decides():
        return _agree(_decide(adapters, groups, decay, tau, budget, min_rank))
    return _agree(_blank(adapters, groups, min_rank))


def stack(adapters: Adapters, names: Sequence[str], factor: str, columns: int) -> Tensor:
    """The leading columns of a factor of adapters of one shape; of S the leading rows, too."""
    tensors = [getattr(adapters[name], factor) for name in names]
    return torch.stack([t[:columns, :columns] if factor == "S" else t[:, :columns] for t in tensors])


def _columns(adapters: Adapters, names: Sequence[str], min_rank: int) -> tuple[int, int]:
    """Columns of the adapters of one shape to compute with, and how many may be live afterwards: twice as many."""
    max_rank = adapters[names[0]].max_rank
    before = functional.computed_columns(max(min_rank, *(adapters[name].rank for name in names)), max_rank)
    return before, min(2 * before, max_rank)


def _group_by_shape(adapters: Adapters) -> list[list[str]]:
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, layer in adapters.items():
        key = (layer.out_features, layer.in_features, layer.max_rank, layer.U.dtype, layer.U.device)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _decide(
    adapters: Adapters,
    groups: Sequence[Sequence[str]],
    decay: Mapping[str, float],
    tau: float | None,
    budget: int | None,
    min_rank: int,
) -> Plan:
    """The new ranks: by tau or as they are, then by the budget."""
    steps, facts = [], []
    for names in groups:
        columns, columns_after = _columns(adapters, names, min_rank)
        U, S, V, K, L = (stack(adapters, names, factor, columns) for factor in FACTORS)
        factor = torch.tensor([decay[name] for name in names], dtype=S.dtype, device=S.device)
        steps.append(functional.decompose(U, S * factor[:, None, None], V, K, L, columns_after))
        pending = (K != 0).flatten(1).any(1) | (L != 0).flatten(1).any(1)
        facts.append(torch.cat([pending[:, None], steps[-1].sigma], 1).to(steps[0].sigma.device))
    # One transfer to the host an adaptation: all singular values, and which adapters have something pending.
    on_host = torch.cat([fact.flatten() for fact in facts]).cpu().double().split([fact.numel() for fact in facts])

    ranks: dict[str, int] = {}
    floors: dict[str, int] = {}
    sigmas: dict[str, list[float]] = {}
    is_pending: dict[str, bool] = {}
    for names, of_group, step in zip(groups, on_host, steps, strict=True):
        fact = of_group.view(len(names), -1)
        layer = adapters[names[0]]
        floor = min(min_rank, layer.max_rank)
        for i, name in enumerate(names):
            is_pending[name] = bool(fact[i, 0])
            ranks[name] = adapters[name].rank
            sigmas[name] = fact[i, 1:].tolist()
        if tau is not None:
            resolution = functional.resolution(layer.out_features, layer.in_features, step.sigma.dtype)
            by_tau = functional.ranks_by_tau(fact[:, 1:], tau, resolution, floor, layer.max_rank).tolist()
            ranks |= {name: rank for name, rank in zip(names, by_tau, strict=True) if is_pending[name]}
        floors |= {name: min(floor, ranks[name]) for name in names}
    if budget is not None:
        costs = [adapters[name].in_features + adapters[name].out_features for name in ranks]
        within = functional.ranks_by_budget(
            list(sigmas.values()), list(ranks.values()), costs, budget, list(floors.values())
        )
        ranks = dict(zip(ranks, within, strict=True))

    moved = {name: rank for name, rank in ranks.items() if is_pending[name] or rank != adapters[name].rank}
    total = sum(value**2 for name in moved for value in sigmas[name])
    dropped = sum(value**2 for name, rank in moved.items() for value in sigmas[name][rank:])
    return Plan(groups, steps, moved, math.sqrt(dropped / total) if total else 0.0)


def _blank(adapters: Adapters, groups: Sequence[Sequence[str]], min_rank: int) -> Plan:
    """Room for the plan of rank 0."""
    steps = []
    for names in groups:
        layer, B = adapters[names[0]], len(names)
        _, columns = _columns(adapters, names, min_rank)
        U, V = (basis.new_empty(B, len(basis), columns) for basis in (layer.U, layer.V))
        steps.append(functional.Decomposition(U, U.new_empty(B, columns), V))
    return Plan(groups, steps, {}, 0.0)


def _agree(plan: Plan) -> Plan:
    """The plan of rank 0 in every process: linear algebra may differ between machines in its last bit."""
    names = [name for group in plan.groups for name in group]
    device = plan.steps[0].U.device
    ranks = torch.tensor([plan.ranks.get(name, -1) for name in names], device=device)  # -1: it does not move
    error = torch.tensor(plan.truncation_error, dtype=torch.float64, device=device)
    factors = [(step.U, step.sigma[:, : step.U.shape[-1]], step.V) for step in plan.steps]
    broadcast_packed([ranks, error, *(factor for of_group in factors for factor in of_group)])
    moved = {name: rank for name, rank in zip(names, ranks.tolist(), strict=True) if rank >= 0}
    return Plan(plan.groups, plan.steps, moved, error.item())
