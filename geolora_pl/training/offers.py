"""What adapters of one shape could keep and take in at a retraction, before a budget is shared out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from geolora_pl.adapters.base import FACTORS, GeoLoRALayer
from geolora_pl.math.decomposition import first
from geolora_pl.math.precision import summing_dtype
from geolora_pl.math.probes import Augmentation, Directions, augment, directions, still_growing, worth_a_rank
from geolora_pl.math.ranks import RankRule, ranks_by_budget, ranks_by_tau, resolution

Adapters = Mapping[str, GeoLoRALayer]

_FIRST_SEED = 2410_18720  # no seed that a user chooses: bases drawn from it could hold the very same random columns


@dataclass(frozen=True)
class Retraction:
    """What a retraction is to do.

    Attributes:
        rule: Chooses the ranks.
        rank_changes: Whether tau may change ranks; if not, only the budget may.
        admits: Whether directions that probes have found become columns, and new probes follow.
        augments: Whether ranks double, as far as there are columns, and tau and the budget do not judge yet.
        judges_all: Whether tau judges also what has nothing pending, because it was augmented and never truncated.
        seed: Of the random probes, at least 0: another one for every retraction.
    """

    rule: RankRule
    rank_changes: bool
    admits: bool
    seed: int
    augments: bool = False
    judges_all: bool = False


@dataclass(frozen=True)
class Offer:
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
        return (self.is_new & first(self.ranks, self.sigma.shape[-1])).sum(-1)

    @property
    def kept(self) -> Tensor:
        """How many of the columns are directions of the point: (B,), int64."""
        return self.ranks - self.admitted


def stack(adapters: Adapters, names: Sequence[str], factor: str, columns: int) -> Tensor:
    """Stack the leading columns of one factor of adapters of one shape, behind the probes; of S also only such rows."""
    if factor == "S":
        return torch.stack([adapters[name].S[:columns, :columns] for name in names])
    return torch.stack([getattr(layer := adapters[name], factor)[:, : layer.probes + columns] for name in names])


def columns_of(adapters: Adapters, names: Sequence[str], min_rank: int) -> tuple[int, int]:
    """How many columns of adapters of one shape to compute with, and how many may be live afterwards."""
    layer = adapters[names[0]]
    before = min(layer.max_rank, max(1, min_rank, *(adapters[name].rank for name in names)))
    return before, min(2 * (before + layer.probes), layer.max_rank)


def group_by_shape(adapters: Adapters) -> list[list[str]]:
    """The names of the adapters whose factors can be stacked, together."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, layer in adapters.items():
        shape = layer.out_features, layer.in_features, layer.max_rank, layer.probes
        groups.setdefault((*shape, layer.U.dtype, layer.U.device), []).append(name)
    return list(groups.values())


def make_offer(adapters: Adapters, names: Sequence[str], decay: Mapping[str, float], what: Retraction) -> Offer:
    """Decompose adapters of one shape and judge what each could keep and take in.

    Args:
        adapters: All adapters by name.
        names: Those of one shape.
        decay: The factor by which S of each adapter has decayed, in [0, 1].
        what: What the retraction is to do.
    """
    layer, columns = adapters[names[0]], columns_of(adapters, names, what.rule.min_rank)[0]
    U, S, V, K, L = (stack(adapters, names, factor, columns) for factor in FACTORS)
    factors = [decay[name] for name in names]
    decayed: Tensor | bool = False
    if any(factor != 1 for factor in factors):  # the condition saves a copy from the host, which may wait for a GPU
        of_each = torch.tensor(factors, dtype=S.dtype, device=S.device)
        S, decayed = S * of_each[:, None, None], of_each != 1
    probes = layer.probes if what.admits else 0
    at = augment(U, S, V, K, L, _random(adapters, names, probes, what.seed) if probes else None)
    stepped = _any(K[..., layer.probes :]) | _any(L[..., layer.probes :])
    present = (U[..., layer.probes :] != 0).any(-2).sum(-1)  # counted on the device to save such a copy
    pending = stepped | ((present == 0) & _any(K)) | what.judges_all
    ranks = _ranks(layer, S, at.sigma, present, pending, what)

    new = directions(at, probes, ranks)
    worth = worth_a_rank(at.sigma, new.sigma, what.rule.tau, _resolution(layer)) & pending[:, None]
    keep = first(ranks, at.sigma.shape[-1])
    # A new direction starts from zero, so it never takes the place of one that its own adapter keeps: it counts for no
    # more than the last of them, but for more than the zeros of what is not kept, behind which it would be sorted.
    last = at.sigma.gather(-1, (ranks[:, None] - 1).clamp_min(0)).clamp_min(torch.finfo(at.sigma.dtype).tiny)
    offered = torch.minimum(new.sigma, last.masked_fill(ranks[:, None] == 0, float("inf"))) * worth
    sigma, order = torch.cat([at.sigma * keep, offered], dim=-1).sort(descending=True, stable=True)
    most = (ranks + worth.sum(-1)).clamp_max(layer.max_rank)
    moves = pending | (ranks != present) | decayed
    if probes:  # an adapter that was loaded at rank 0 and without probes would otherwise never have a gradient
        moves = moves | ((present == 0) & ~_any(U[..., :probes]))
    room = min(layer.out_features, layer.in_features) - ranks
    return Offer(names, at, new, room, sigma, order >= keep.shape[-1], most, moves)


def _any(factors: Tensor) -> Tensor:
    """Whether each matrix (B, rows, columns) has an entry that is not zero: (B,), bool."""
    return factors.abs().amax((-2, -1)) > 0  # several times as fast as a norm, or as any() of booleans


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
        clear_unused_rows(adapters, names, of_V)
    return of_U, of_V


def clear_unused_rows(adapters: Adapters, names: Sequence[str], of_V: Tensor) -> None:
    """Set to zero, in columns (B, n, ...) on the side of V, the rows that their layers do not use."""
    for of_one, name in zip(of_V, names, strict=True):
        if (row := adapters[name].unused_row) is not None:
            of_one[row] = 0


def _ranks(layer: GeoLoRALayer, S: Tensor, sigma: Tensor, present: Tensor, pending: Tensor, what: Retraction) -> Tensor:
    """How many singular values of each point to keep, where S was the coefficients before."""
    if not what.rank_changes:
        return present
    if what.augments:
        return torch.where(pending, (2 * present).clamp_max(layer.max_rank), present)
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


def within_budget(adapters: Adapters, offers: Sequence[Offer], budget: int, min_rank: int) -> list[Offer]:
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


def truncation_error(offers: Sequence[Offer]) -> Tensor:
    """Relative Frobenius norm of what is dropped, over all adapters that move: ()."""
    device = offers[0].ranks.device
    sums = []
    for offer in offers:
        sigma, moves = offer.at.sigma, offer.moves[:, None]
        beyond = ~first(offer.kept, sigma.shape[-1])
        energy = sigma.to(summing_dtype(sigma.device)).square() * moves
        sums.append(torch.stack([(energy * beyond).sum(), energy.sum()]).to(device))
    dropped, total = torch.stack(sums).sum(0).unbind()
    return (dropped / total.clamp_min(torch.finfo(total.dtype).tiny)).sqrt()
