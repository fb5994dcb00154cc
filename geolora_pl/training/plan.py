"""The plan of a retraction, made before anything changes: where every adapter goes, and at which rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from geolora_pl.adapters.base import FACTORS, GeoLoRALayer
from geolora_pl.math import decomposition
from geolora_pl.math.precision import summing_dtype
from geolora_pl.math.ranks import RankRule, ranks_by_budget, ranks_by_tau, resolution
from geolora_pl.training.distributed import broadcast_packed, decides, processes

Adapters = Mapping[str, GeoLoRALayer]


@dataclass(frozen=True)
class GroupPlan:
    """A retraction of B adapters of one shape, on their device.

    Attributes:
        names: The names of the adapters.
        step: The decomposition of each point plus its pending step, with as many singular vectors as any may keep.
        ranks: (B,), int64, the new ranks.
        moves: (B,), bool; an adapter with nothing pending keeps its factors to the bit, unless it loses ranks.
    """

    names: Sequence[str]
    step: decomposition.Decomposition
    ranks: Tensor
    moves: Tensor


@dataclass(frozen=True)
class Plan:
    """A retraction of all adapters.

    Attributes:
        groups: The plans of all adapters, those of one shape together.
        truncation_error: (), relative Frobenius norm of what is dropped, over all adapters that move.
    """

    groups: Sequence[GroupPlan]
    truncation_error: Tensor

    def on_host(self) -> tuple[dict[str, int], float]:
        """Return every adapter's new rank and the truncation error, in one transfer, which waits for the device."""
        names = [name for group in self.groups for name in group.names]
        ranks = [group.ranks.to(self.truncation_error) for group in self.groups]
        *on_host, error = torch.cat([*ranks, self.truncation_error[None]]).tolist()
        return {name: int(rank) for name, rank in zip(names, on_host, strict=True)}, error


def plan_retraction(
    adapters: Adapters, decay: Mapping[str, float], rule: RankRule, rank_changes: bool, whole: bool
) -> Plan:
    """Plan a retraction; where several processes train together, rank 0 sends its plan to all in one message.

    Args:
        adapters: The adapters by name.
        decay: The factor by which S of each adapter has decayed, in [0, 1].
        rule: Chooses the ranks.
        rank_changes: Whether tau may change ranks; if not, only the budget may.
        whole: Whether adapters with nothing pending move as well.
    """
    if processes() == 1:
        return _decide(adapters, decay, rule, rank_changes, whole)
    plan = _decide(adapters, decay, rule, rank_changes, whole) if decides() else _blank(adapters, rule.min_rank)
    return _agree(plan)


def stack(adapters: Adapters, names: Sequence[str], factor: str, columns: int) -> Tensor:
    """Stack the leading columns of one factor of adapters of one shape; of S also only the leading rows."""
    tensors = [getattr(adapters[name], factor) for name in names]
    return torch.stack([t[:columns, :columns] if factor == "S" else t[:, :columns] for t in tensors])


def _columns(adapters: Adapters, names: Sequence[str], min_rank: int) -> tuple[int, int]:
    """How many columns of adapters of one shape to compute with, and how many may be live afterwards."""
    max_rank = adapters[names[0]].max_rank
    before = decomposition.computed_columns(max(min_rank, *(adapters[name].rank for name in names)), max_rank)
    return before, min(2 * before, max_rank)


def _group_by_shape(adapters: Adapters) -> list[list[str]]:
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, layer in adapters.items():
        key = (layer.out_features, layer.in_features, layer.max_rank, layer.U.dtype, layer.U.device)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _decide(adapters: Adapters, decay: Mapping[str, float], rule: RankRule, rank_changes: bool, whole: bool) -> Plan:
    """Choose the new ranks by tau, or keep them, then apply the budget. No number is read from a device."""
    groups = [_decide_group(adapters, names, decay, rule, rank_changes, whole) for names in _group_by_shape(adapters)]
    if rule.budget is not None:
        groups = _within_budget(adapters, groups, rule.budget, rule.min_rank)
    return Plan(groups, _truncation_error(groups))


def _decide_group(
    adapters: Adapters,
    names: Sequence[str],
    decay: Mapping[str, float],
    rule: RankRule,
    rank_changes: bool,
    whole: bool,
) -> GroupPlan:
    layer = adapters[names[0]]
    columns, columns_after = _columns(adapters, names, rule.min_rank)
    U, S, V, K, L = (stack(adapters, names, factor, columns) for factor in FACTORS)
    factors = [decay[name] for name in names]
    if any(factor != 1 for factor in factors):  # the condition saves a copy from the host, which may wait for a GPU
        S = S * torch.tensor(factors, dtype=S.dtype, device=S.device)[:, None, None]
    step = decomposition.decompose(U, S, V, K, L, columns_after)
    pending = K.flatten(1).any(1) | L.flatten(1).any(1) | whole
    ranks = (U != 0).any(-2).sum(-1)  # the present ranks, counted on the device to save such a copy
    if rank_changes:
        least = resolution(layer.out_features, layer.in_features, step.sigma.dtype)
        floor = min(rule.min_rank, layer.max_rank)
        ranks = torch.where(pending, ranks_by_tau(step.sigma, rule.tau, least, floor, layer.max_rank), ranks)
    return GroupPlan(names, step, ranks, pending)


def _within_budget(adapters: Adapters, groups: Sequence[GroupPlan], budget: int, min_rank: int) -> list[GroupPlan]:
    """Lower ranks where the budget asks for it, also those of adapters with nothing pending."""
    layers = [adapters[group.names[0]] for group in groups]
    within = ranks_by_budget(
        [group.step.sigma for group in groups],
        [group.ranks for group in groups],
        [layer.in_features + layer.out_features for layer in layers],
        budget,
        [group.ranks.clamp_max(min(min_rank, layer.max_rank)) for group, layer in zip(groups, layers, strict=True)],
    )
    return [
        replace(group, ranks=ranks, moves=group.moves | (ranks != group.ranks))
        for group, ranks in zip(groups, within, strict=True)
    ]


def _truncation_error(groups: Sequence[GroupPlan]) -> Tensor:
    device = groups[0].ranks.device
    sums = []
    for group in groups:
        sigma, moves = group.step.sigma, group.moves[:, None]
        beyond = torch.arange(sigma.shape[-1], device=sigma.device) >= group.ranks[:, None]
        energy = sigma.to(summing_dtype(sigma.device)).square() * moves
        sums.append(torch.stack([(energy * beyond).sum(), energy.sum()]).to(device))
    dropped, total = torch.stack(sums).sum(0).unbind()
    return (dropped / total.clamp_min(torch.finfo(total.dtype).tiny)).sqrt()


def _blank(adapters: Adapters, min_rank: int) -> Plan:
    """Allocate the tensors that will receive the plan of rank 0."""
    groups = []
    for names in _group_by_shape(adapters):
        layer, B = adapters[names[0]], len(names)
        _, columns = _columns(adapters, names, min_rank)
        U, V = (basis.new_empty(B, len(basis), columns) for basis in (layer.U, layer.V))
        step = decomposition.Decomposition(U, U.new_empty(B, columns), V)
        groups.append(GroupPlan(names, step, *(U.new_empty(B, dtype=dtype) for dtype in (torch.int64, torch.bool))))
    device = groups[0].ranks.device
    return Plan(groups, torch.empty((), dtype=summing_dtype(device), device=device))


def _agree(plan: Plan) -> Plan:
    """Give every process the plan of rank 0: the last bit of linear algebra may differ between machines."""
    tensors = [plan.truncation_error]
    for group in plan.groups:
        U, sigma, V = group.step
        tensors += group.ranks, group.moves, U, sigma[:, : U.shape[-1]], V
    broadcast_packed(tensors)
    return plan
