"""One adaptation of all adapters of a BERT-base: in batches of one shape, as the integrator does it, and one by one.

The batches are also taken with the Gram matrix and Cholesky's factorisation in the place of QR.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.shared.methods import defaults
from benchmarks.speed import factorisations, timing
from geolora_pl import AdapterConfig, GeoLoRACallback, RankAdaptiveIntegrator, RiemannianAdam, inject_adapters
from geolora_pl.math.decomposition import orthonormality_defect

WARMUP = 3  # rounds that are not counted
SHAPES = 4 * [(768, 768)] + [
    (3072, 768),
    (768, 3072),
]  # (out, in) of query, key, value and output, and of both layers of the MLP


class Adapters:
    """Adapters without a model, their optimizer, and the state to which they return before every adaptation.

    Args:
        device: Device of the adapters.
        depth: Number of blocks of the encoder.
        max_rank: Columns allocated for each adapter.
        one_by_one: Whether each adapter has an integrator of its own.
        qr: What the measured adaptation calls for ``torch.linalg.qr``.
    """

    def __init__(
        self,
        device: str,
        depth: int,
        max_rank: int,
        one_by_one: bool = False,
        qr: Callable[..., Any] = factorisations.householder,
    ) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(n, m, bias=False) for m, n in depth * SHAPES)).to(device)
        self.layers = list(inject_adapters(model, AdapterConfig(max_rank=max_rank)).values())
        tau = defaults(GeoLoRACallback)["tau"]
        roots = [nn.Sequential(layer) for layer in self.layers] if one_by_one else [model]
        self.integrators = [RankAdaptiveIntegrator(root, tau) for root in roots]
        self.optimizer = RiemannianAdam(model)
        for _ in range(3):  # the ranks settle as in a run
            self._take_a_step()
            for integrator in self.integrators:
                integrator.step(self.optimizer)
        self._take_a_step()
        self._saved = [tensor.clone() for tensor in self._tensors()]
        self._qr = qr

    def _take_a_step(self) -> None:
        """Leave increments and moments as training does: columns of K and L whose bases are zero have no gradient."""
        for layer in self.layers:
            for factor, basis in ((layer.K, layer.V), (layer.L, layer.U)):
                factor.grad = torch.randn_like(factor) * (basis != 0).any(0)
        self.optimizer.step()

    def _tensors(self) -> list[Tensor]:
        factors = [tensor for layer in self.layers for tensor in (layer.U, layer.S, layer.V, layer.K, layer.L)]
        return factors + [m for state in self.optimizer.state.values() for m in state.values()]

    @torch.no_grad()
    def adapt(self, device: str) -> float:
        """Adapt once from the saved state, and return the seconds it takes."""
        torch._foreach_copy_(self._tensors(), self._saved)
        for layer in self.layers:
            layer.read_rank()
        for integrator in self.integrators:
            integrator.steps = 1  # of which the saved state is the result
        watch = timing.Stopwatch(device)
        with mock.patch.object(torch.linalg, "qr", self._qr):
            watch.mark()
            for integrator in self.integrators:
                integrator.step(self.optimizer)
            watch.mark()
        return watch.seconds()[0]

    def ranks(self) -> list[int]:
        return [layer.rank for layer in self.layers]

    def defect(self) -> float:
        """How far the bases are from orthonormal, at most."""
        return max(orthonormality_defect(basis).item() for layer in self.layers for basis in (layer.U, layer.V))


def measure(device: str, rounds: int, depth: int = 12, max_rank: int = 16) -> dict[str, Any]:
    """Time all ways in turns.

    Returns:
        Quartiles of the milliseconds ``batched``, ``one_by_one`` and ``gram_cholesky``, of the ``ratio`` of the first
        to the second and of the ``gram_cholesky_ratio`` of the third to the first within a round; the number of
        ``adapters``, and afterwards their mean ``rank`` and the ``defect`` of their bases, also by Gram and Cholesky.
    """
    ways = {
        "batched": Adapters(device, depth, max_rank),
        "one_by_one": Adapters(device, depth, max_rank, one_by_one=True),
        "gram_cholesky": Adapters(device, depth, max_rank, qr=factorisations.gram_cholesky),
    }
    order = list(ways)
    draw = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-WARMUP, rounds):
        draw.shuffle(order)
        for name in order:
            seconds = ways[name].adapt(device)
            if number >= 0:
                times[name].append(seconds)
    ranks = ways["batched"].ranks()
    assert ranks == ways["one_by_one"].ranks(), "both ways do the same work"
    other = ways["gram_cholesky"]
    return {
        **{name: timing.quartiles([1e3 * s for s in seconds]) for name, seconds in times.items()},
        "ratio": _ratio(times["batched"], times["one_by_one"]),
        "gram_cholesky_ratio": _ratio(times["gram_cholesky"], times["batched"]),
        "adapters": len(ranks),
        "rank": mean_rank(ranks),
        "gram_cholesky_rank": mean_rank(other.ranks()),
        "defect": ways["batched"].defect(),
        "gram_cholesky_defect": other.defect(),
    }


def mean_rank(ranks: list[int]) -> float:
    return round(sum(ranks) / len(ranks), 2)


def _ratio(times: list[float], others: list[float]) -> list[float]:
    return timing.quartiles([a / b for a, b in zip(times, others, strict=True)])
