"""The running mean of a model in training: adapters as the mean of their updates, all else entry by entry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geolora_pl.adapters.base import FACTORS
from geolora_pl.math.averages import mean_update
from geolora_pl.math.decomposition import without_probes
from geolora_pl.math.precision import exact_products
from geolora_pl.training.distributed import broadcast_packed
from geolora_pl.training.integrator import RankAdaptiveIntegrator
from geolora_pl.training.internals import foreach_copy_, foreach_lerp_
from geolora_pl.training.offers import group_by_shape
from geolora_pl.training.threads import one_thread
from geolora_pl.training.uninterrupted import finish

_EARLIER = ("A", "B")  # the mean up to the last fold, as A B^T
_SINCE = ("K", "L")  # what is averaged since then


class RunningMean:
    r"""The exponential moving average of what the optimizer trains, with a mean of low-rank updates as one such update.

    Between two retractions U, S and V stand still, and the update ``(U S + K) V^T + U L^T`` is linear in K and L. So a
    step averages K and L alone, which are as large as the step that the optimizer has just taken. Before bases change,
    the mean so far is ``a A B^T + ((1 - a) U S + K) V^T + U L^T``, where ``A B^T`` is the mean at the fold before and
    ``a`` what it still counts for. A fold writes this as one product of 3 R columns and truncates it to R columns, by
    QR on both sides and the SVD of the core: ``O((m + n) R^2)`` per retraction.

    It keeps three times the size of the adapters: the mean, a copy of the bases, and the means of K and L.

    Where several processes train together, the factors of rank 0 are those of all.

    Args:
        integrator: It moves the adapters; its counters say whether bases have changed.
        places: What else is averaged, by name, as a module and the name of its parameter or buffer of real or complex
            numbers, in whose place a step may put another tensor. The means have at least the precision of float32.
    """

    def __init__(self, integrator: RankAdaptiveIntegrator, places: Mapping[str, tuple[nn.Module, str]]) -> None:
        self._integrator = integrator
        self._places = dict(places)
        self._restart()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What else is averaged, as it is now."""
        return ((name, getattr(module, attribute)) for name, (module, attribute) in self._places.items())

    def take_in(self, places: Mapping[str, tuple[nn.Module, str]]) -> None:
        """Average these as well, which have been as they are now since the mean was begun; those known go on."""
        new = {name: place for name, place in places.items() if name not in self._places}
        self._places |= new
        self._entries |= {n: _wide(getattr(module, attribute)).clone() for n, (module, attribute) in new.items()}

    def _restart(self) -> None:
        """Forget the mean: the next state begins it."""
        self._updates = 0
        self._share = 0.0  # of the mean at the last fold in the mean now
        self._moves = self._count_of_moves()
        self._entries = {name: _wide(tensor).clone() for name, tensor in self._tensors()}
        self._factors: dict[str, dict[str, Tensor]] = {}
        for name, layer in self._integrator.adapters.items():
            copies = {factor: getattr(layer, factor).detach().clone() for factor in FACTORS}
            U, _, V, _, _ = without_probes(*copies.values())
            self._factors[name] = {"A": torch.zeros_like(U), "B": torch.zeros_like(V), **copies}

    def _count_of_moves(self) -> tuple[int, int]:
        return self._integrator.adaptations, self._integrator.rollbacks

    @property
    def started(self) -> bool:
        """Whether there is a mean. After a rollback there is none: what it averaged was on the way to divergence."""
        return self._updates > 0 and self._moves[1] == self._integrator.rollbacks

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Take the present state into the mean.

        Args:
            decay: What the mean so far counts for, in [0, 1); the first state is taken as it is.
        """
        if not self.started:
            self._restart()
            self._updates = 1
            return
        if self._moves != self._count_of_moves():
            self._fold()
        self._updates += 1
        self._share *= decay
        adapters = self._integrator.adapters
        means = [self._factors[name][side] for side in _SINCE for name in adapters]
        foreach_lerp_(
            means, [getattr(layer, side).detach() for side in _SINCE for layer in adapters.values()], 1 - decay
        )
        for name, tensor in self._tensors():
            mean, now = self._entries[name], _wide(tensor)
            # Beside an infinity, as in a mask, there is no mean: the difference would be undefined.
            mean.copy_(torch.where(mean.isfinite(), mean.lerp(now, 1 - decay), now))

    def _fold(self) -> None:
        """Write the mean in one pair of factors, and begin to average in the present bases."""
        folded = self._mean_factors()
        adapters = self._integrator.adapters

        def write() -> None:
            for name, (U, sigma, V) in folded.items():
                torch.mul(U, sigma, out=self._factors[name]["A"])
                self._factors[name]["B"].copy_(V)
            foreach_copy_(
                [self._factors[name][basis] for basis in "USV" for name in adapters],
                [getattr(layer, basis).detach() for basis in "USV" for layer in adapters.values()],
            )
            for factors in self._factors.values():
                for side in _SINCE:
                    factors[side].zero_()
            self._share = 1.0
            self._moves = self._count_of_moves()

        finish(write)

    def _mean_factors(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """The mean of every adapter as its R leading singular triplets: U (m, R), sigma (R,), V (n, R)."""
        groups = group_by_shape(self._integrator.adapters)
        means = [self._mean_of(names) for names in groups]
        broadcast_packed([part for parts in means for part in parts])
        found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for names, parts in zip(groups, means, strict=True):
            found |= zip(names, zip(*(part.unbind() for part in parts), strict=True), strict=True)
        return found

    def _mean_of(self, names: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """The mean of B adapters of one shape: U (B, m, R), sigma (B, R), V (B, n, R)."""
        layer = self._integrator.adapters[names[0]]
        A, B, U, S, V, K, L = (
            torch.stack([self._factors[name][factor] for name in names]) for factor in (*_EARLIER, *FACTORS)
        )
        with exact_products(layer.U.device), one_thread(layer.U.device):
            mean = mean_update(A, B, self._share, without_probes(U, S, V, K, L), layer.max_rank)
        return mean.U, mean.sigma[:, : layer.max_rank], mean.V

    @torch.no_grad()
    def values(self) -> list[tuple[Tensor, Tensor]]:
        """Every tensor that is averaged and the value that it has in the mean, in its own precision.

        Adapters are truncated to their present ranks, so that a budget holds for the mean as well, and nothing is
        pending in them. Every process must call this.
        """
        pairs: list[tuple[Tensor, Tensor]] = []
        for name, (U, sigma, V) in self._mean_factors().items():
            layer = self._integrator.adapters[name]
            r, p = layer.rank, layer.probes
            new = {factor: torch.zeros_like(getattr(layer, factor)) for factor in FACTORS}
            new["U"][:, p : p + r], new["S"][:r, :r], new["V"][:, p : p + r] = U[:, :r], sigma[:r].diag(), V[:, :r]
            if layer.unused_row is not None:
                new["V"][layer.unused_row] = 0  # where the factorisation leaves rounding
            pairs += [(getattr(layer, factor), new[factor]) for factor in FACTORS]
        entries = [(tensor, self._entries[name].to(tensor.dtype)) for name, tensor in self._tensors()]
        broadcast_packed([value for _, value in entries])  # running statistics differ between processes
        return pairs + entries

    def state_dict(self) -> dict[str, Any]:
        """Everything for a run that is resumed; nothing before the first update."""
        if not self.started:
            return {}
        return {
            "updates": self._updates,
            "share": self._share,
            "moves": self._moves,
            "factors": self._factors,
            "entries": self._entries,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave, once the integrator has taken up its own state.

        Raises:
            ValueError: It is the mean of something else.
        """
        if not state:
            return
        ours, theirs = _by_name(self._entries, self._factors), _by_name(state["entries"], state["factors"])
        if differ := sorted(set(ours) ^ set(theirs)) or [n for n in ours if ours[n].shape != theirs[n].shape]:
            raise ValueError(
                f"{differ[0]} is averaged in this run and not in that of the checkpoint, or the other way round, or "
                f"has another shape ({len(differ)} such tensors): use the model and use_buffers of that run"
            )
        for name, tensor in ours.items():
            tensor.copy_(theirs[name])
        self._updates, self._share = state["updates"], state["share"]
        self._moves = (int(state["moves"][0]), int(state["moves"][1]))


def _wide(tensor: Tensor) -> Tensor:
    """The values of a tensor, in float32 at least: a step of a mean is below the rounding of 16 bits."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _by_name(entries: Mapping[str, Tensor], factors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    of_adapters = {f"{name}.{factor}": tensor for name, group in factors.items() for factor, tensor in group.items()}
    return {**entries, **of_adapters}
