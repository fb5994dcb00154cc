"""The plan of a retraction, made before anything changes: where every adapter goes, and at which rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from geolora_pl.adapters.base import FACTORS, GeoLoRALayer
from geolora_pl.math import decomposition
from geolora_pl.math.precision import summing_dtype
from geolora_pl.math.probes import (
    Augmentation,
    Directions,
    augment,
    directions,
    new_basis,
    places,
    remembered,
    still_growing,
    worth_a_rank,
)
from geolora_pl.math.ranks import RankRule, ranks_by_budget, ranks_by_tau, resolution
from geolora_pl.training.distributed import broadcast_packed, decides, processes

Adapters = Mapping[str, GeoLoRALayer]

_FIRST_SEED = 2410_18720  # no seed that a user chooses: bases drawn from it could hold the very same random columns


@dataclass(frozen=True)
class GroupPlan:
    """A retraction of B adapters of one shape, on their device.

    Attributes:
        names: The names of the adapters.
        U: (B, m, p + c), the new bases, probes included, with as many columns as any may need.
        sigma: (B, c), the new coefficients.
        V: (B, n, p + c).
        gathered: (B, p), what the new probes start with: their columns of K are those of U times these numbers.
        ranks: (B,), int64, the new ranks.
        moves: (B,), bool; an adapter with nothing pending keeps its factors to the bit, unless it loses ranks, or has
            no rank and no probes and so gets some.
    """

    names: Sequence[str]
    U: Tensor
    sigma: Tensor
    V: Tensor
    gathered: Tensor
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


@dataclass(frozen=True)
class Retraction:
    """What a retraction is to do.

    Attributes:
        rule: Chooses the ranks.
        rank_changes: Whether tau may change ranks; if not, only the budget may.
        admits: Whether directions that probes have found become columns, and new probes follow.
        seed: Of the random probes, at least 0: another one for every retraction.
    """

    rule: RankRule
    rank_changes: bool
    admits: bool
    seed: int


def plan_retraction(adapters: Adapters, decay: Mapping[str, float], what: Retraction) -> Plan:
    """Plan a retraction; where several processes train together, rank 0 sends its plan to all in one message.

    Args:
        adapters: The adapters by name.
        decay: The factor by which S of each adapter has decayed, in [0, 1].
        what: What to do with them.
    """
    if processes() == 1:
        return _decide(adapters, decay, what)
    plan = _decide(adapters, decay, what) if decides() else _blank(adapters, what.rule.min_rank)
    return _agree(plan)


def stack(adapters: Adapters, names: Sequence[str], factor: str, columns: int) -> Tensor:
    """Stack the leading columns of one factor of adapters of one shape, behind the probes; of S also only such rows."""
    if factor == "S":
        return torch.stack([adapters[name].S[:columns, :columns] for name in names])
    return torch.stack([getattr(layer := adapters[name], factor)[:, : layer.probes + columns] for name in names])


def _columns(adapters: Adapters, names: Sequence[str], min_rank: int) -> tuple[int, int]:
    """How many columns of adapters of one shape to compute with, and how many may be live afterwards."""
    layer = adapters[names[0]]
    rank = max(min_rank, *(adapters[name].rank for name in names))
    before = decomposition.computed_columns(rank, layer.max_rank, layer.probes)
    return before, min(2 * (before + layer.probes), layer.max_rank)


def _group_by_shape(adapters: Adapters) -> list[list[str]]:
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, layer in adapters.items():
        shape = layer.out_features, layer.in_features, layer.max_rank, layer.probes
        groups.setdefault((*shape, layer.U.dtype, layer.U.device), []).append(name)
    return list(groups.values())


@dataclass(frozen=True)
class _Offer:
    """What each adapter of a group could keep and take in, before the budget has its say.

    Attributes:
        names: The names of the adapters.
        at: Each point with its pending step and its probes, in one coordinate system per side.
        new: Directions outside of what each point keeps.
        room: (B,), int64, how many of them have a place beside it.
        sigma: (B, k), the singular values on offer, descending.
        is_new: (B, k), bool, which of them are those of new directions.
        ranks: (B,), int64, how many of them become columns.
        moves: (B,), bool.
    """

    names: Sequence[str]
    at: Augmentation
    new: Directions
    room: Tensor
    sigma: Tensor
    is_new: Tensor
    ranks: Tensor
    moves: Tensor

    @property
    def admitted(self) -> Tensor:
        """How many of the columns are new directions: (B,), int64."""
        return (self.is_new & decomposition.first(self.ranks, self.sigma.shape[-1])).sum(-1)

    @property
    def kept(self) -> Tensor:
        """How many of the columns are directions of the point: (B,), int64."""
        return self.ranks - self.admitted


def _decide(adapters: Adapters, decay: Mapping[str, float], what: Retraction) -> Plan:
    """Choose the new ranks by tau, or keep them, then apply the budget. No number is read from a device."""
    offers = [_offer(adapters, names, decay, what) for names in _group_by_shape(adapters)]
    if what.rule.budget is not None:
        offers = _within_budget(adapters, offers, what.rule.budget, what.rule.min_rank)
    groups = [_take(adapters, offer, what) for offer in offers]
    return Plan(groups, _truncation_error(offers))


def _offer(adapters: Adapters, names: Sequence[str], decay: Mapping[str, float], what: Retraction) -> _Offer:
    layer, columns = adapters[names[0]], _columns(adapters, names, what.rule.min_rank)[0]
    U, S, V, K, L = (stack(adapters, names, factor, columns) for factor in FACTORS)
    factors = [decay[name] for name in names]
    if any(factor != 1 for factor in factors):  # the condition saves a copy from the host, which may wait for a GPU
        S = S * torch.tensor(factors, dtype=S.dtype, device=S.device)[:, None, None]
    probes = layer.probes if what.admits else 0
    at = augment(U, S, V, K, L, _random(adapters, names, probes, what.seed) if probes else None)
    stepped = _any(K[..., layer.probes :]) | _any(L[..., layer.probes :])
    present = (U[..., layer.probes :] != 0).any(-2).sum(-1)  # counted on the device to save such a copy
    pending = stepped | ((present == 0) & _any(K))
    ranks = _ranks(layer, S, at.sigma, present, pending, what)

    new = directions(at, probes, ranks)
    worth = worth_a_rank(at.sigma, new.sigma, what.rule.tau, _resolution(layer)) & pending[:, None]
    keep = decomposition.first(ranks, at.sigma.shape[-1])
    # A new direction starts from zero, so it never takes the place of one that its own adapter keeps.
    last = at.sigma.gather(-1, (ranks[:, None] - 1).clamp_min(0)).masked_fill(ranks[:, None] == 0, float("inf"))
    offered = torch.minimum(new.sigma, last) * worth
    sigma, order = torch.cat([at.sigma * keep, offered], dim=-1).sort(descending=True, stable=True)
    most = (ranks + worth.sum(-1)).clamp_max(layer.max_rank)
    moves = pending | (ranks != present)
    if probes:  # an adapter that was loaded at rank 0 and without probes would otherwise never have a gradient
        moves = moves | ((present == 0) & ~_any(U[..., :probes]))
    room = min(layer.out_features, layer.in_features) - ranks
    return _Offer(names, at, new, room, sigma, order >= keep.shape[-1], most, moves)


def _any(factors: Tensor) -> Tensor:
    """Whether each matrix (B, rows, columns) has an entry that is not zero; a norm needs no copy of a part of it."""
    largest: Tensor = torch.linalg.vector_norm(factors, float("inf"), dim=(-2, -1))
    return largest > 0


def _random(adapters: Adapters, names: Sequence[str], probes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random columns for both sides of adapters of one shape."""
    layer = adapters[names[0]]
    generator = torch.Generator(layer.U.device).manual_seed(_FIRST_SEED + seed)  # leaves the user's numbers alone
    of_U, of_V = (
        torch.randn(len(side), probes, generator=generator, dtype=side.dtype, device=side.device)
        for side in (layer.U, layer.V)
    )
    if any(adapters[name].unused_row is not None for name in names):
        of_V = of_V.repeat(len(names), 1, 1)
        for of_one, name in zip(of_V, names, strict=True):
            if (row := adapters[name].unused_row) is not None:
                of_one[row] = 0
    return of_U, of_V


def _ranks(layer: GeoLoRALayer, S: Tensor, sigma: Tensor, present: Tensor, pending: Tensor, what: Retraction) -> Tensor:
    """How many singular values of each point to keep, where S was the coefficients before."""
    if not what.rank_changes:
        return present
    limits = _resolution(layer), min(what.rule.min_rank, layer.max_rank), layer.max_rank
    by_tau = ranks_by_tau(sigma, what.rule.tau, *limits)
    if not layer.probes:  # Algorithm 1 of GeoLoRA, in which every direction has taken a step
        return torch.where(pending, by_tau, present)
    if what.admits:
        return torch.where(pending, still_growing(sigma, S.diagonal(dim1=-2, dim2=-1), by_tau, present), present)
    # Nothing can be gathered any more in a direction that was admitted last and never took a step.
    in_use = ranks_by_tau(sigma, 0.0, *limits)
    at_rest = torch.where(sigma[:, 0] > 0, torch.minimum(present, in_use), present)
    return torch.where(pending, by_tau, at_rest)


def _resolution(layer: GeoLoRALayer) -> float:
    return resolution(layer.out_features, layer.in_features, layer.U.dtype)


def _take(adapters: Adapters, offer: _Offer, what: Retraction) -> GroupPlan:
    """The new factors of a group, once the ranks are final."""
    layer, (at, new, kept) = adapters[offer.names[0]], (offer.at, offer.new, offer.kept)
    _, rank = _columns(adapters, offer.names, what.rule.min_rank)
    probes, columns = layer.probes if what.admits else 0, at.sigma.shape[-1]
    source, used = places(
        kept,
        offer.admitted,
        in_line=(new.sigma > 0).sum(-1),
        room=offer.room,  # the budget makes more room, but no more directions
        probes=probes,
        columns=columns,
        rank=rank,
    )
    idle = layer.probes - probes, 0
    U = F.pad(new_basis(at.Q_U, at.P_U, new.U, source, used), idle)
    V = F.pad(new_basis(at.Q_V, at.P_V, new.V, source, used), idle)
    sigma = F.pad(at.sigma, (0, max(0, rank - columns)))[:, :rank] * decomposition.first(kept, rank)
    gathered = F.pad(remembered(new.sigma, source[:, :probes], used[:, :probes], columns), idle)
    return GroupPlan(offer.names, U, sigma, V, gathered, offer.ranks, offer.moves)


def _within_budget(adapters: Adapters, offers: Sequence[_Offer], budget: int, min_rank: int) -> list[_Offer]:
    """Lower ranks where the budget asks for it, also those of adapters with nothing pending."""
    layers = [adapters[offer.names[0]] for offer in offers]
    within = ranks_by_budget(
        [offer.sigma for offer in offers],
        [offer.ranks for offer in offers],
        [layer.in_features + layer.out_features for layer in layers],
        budget,
        [offer.ranks.clamp_max(min(min_rank, layer.max_rank)) for offer, layer in zip(offers, layers, strict=True)],
    )
    return [
        replace(offer, ranks=ranks, moves=offer.moves | (ranks != offer.ranks))
        for offer, ranks in zip(offers, within, strict=True)
    ]


def _truncation_error(offers: Sequence[_Offer]) -> Tensor:
    device = offers[0].ranks.device
    sums = []
    for offer in offers:
        sigma, moves = offer.at.sigma, offer.moves[:, None]
        beyond = ~decomposition.first(offer.kept, sigma.shape[-1])
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
        U, V = (basis.new_empty(B, len(basis), layer.probes + columns) for basis in (layer.U, layer.V))
        ranks, moves = (U.new_empty(B, dtype=dtype) for dtype in (torch.int64, torch.bool))
        gathered = U.new_empty(B, layer.probes)
        groups.append(GroupPlan(names, U, U.new_empty(B, columns), V, gathered, ranks, moves))
    device = groups[0].ranks.device
    return Plan(groups, torch.empty((), dtype=summing_dtype(device), device=device))


def _agree(plan: Plan) -> Plan:
    """Give every process the plan of rank 0: the last bit of linear algebra may differ between machines."""
    tensors = [plan.truncation_error]
    for group in plan.groups:
        tensors += group.ranks, group.moves, group.U, group.sigma, group.V, group.gathered
    broadcast_packed(tensors)
    return plan
