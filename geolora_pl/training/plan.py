"""The plan of a retraction, made before anything changes: where every adapter goes, and at which rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from geolora_pl.math.decomposition import first
from geolora_pl.math.precision import summing_dtype
from geolora_pl.math.probes import new_basis, places, remembered
from geolora_pl.training.distributed import broadcast_packed, decides, processes
from geolora_pl.training.offers import (
    Adapters,
    Offer,
    Retraction,
    clear_unused_rows,
    columns_of,
    group_by_shape,
    make_offer,
    truncation_error,
    within_budget,
)


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


def _decide(adapters: Adapters, decay: Mapping[str, float], what: Retraction) -> Plan:
    """Choose the new ranks by tau, or keep them, then apply the budget. No number is read from a device."""
    offers = [make_offer(adapters, names, decay, what) for names in group_by_shape(adapters)]
    if what.rule.budget is not None and not what.augments:
        offers = within_budget(adapters, offers, what.rule.budget, what.rule.min_rank)
    groups = [_take(adapters, offer, what) for offer in offers]
    return Plan(groups, truncation_error(offers))


def _take(adapters: Adapters, offer: Offer, what: Retraction) -> GroupPlan:
    """The new factors of a group, once the ranks are final."""
    layer, (at, new, kept) = adapters[offer.names[0]], (offer.at, offer.new, offer.kept)
    _, rank = columns_of(adapters, offer.names, what.rule.min_rank)
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
    U = new_basis(at.Q_U, at.P_U, new.U, source, used)
    V = new_basis(at.Q_V, at.P_V, new.V, source, used)
    # The factorisation leaves rounding there, which an optimizer that divides by it would enlarge.
    clear_unused_rows(adapters, offer.names, V)
    sigma = F.pad(at.sigma, (0, max(0, rank - columns)))[:, :rank] * first(kept, rank)
    gathered = remembered(new.sigma, source[:, :probes], used[:, :probes], columns)
    if idle := layer.probes - probes:
        U, V, gathered = (F.pad(of_some, (idle, 0)) for of_some in (U, V, gathered))
    return GroupPlan(offer.names, U, sigma, V, gathered, offer.ranks, offer.moves)


def _blank(adapters: Adapters, min_rank: int) -> Plan:
    """Allocate the tensors that will receive the plan of rank 0."""
    groups = []
    for names in group_by_shape(adapters):
        layer, B = adapters[names[0]], len(names)
        _, columns = columns_of(adapters, names, min_rank)
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
