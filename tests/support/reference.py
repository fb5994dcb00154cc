"""Naive float64 oracles: dense matrices, no batching, no care for speed."""

import torch
from torch import Tensor, nn

from geolora_pl import AdapterConfig, RankAdaptiveIntegrator, inject_adapters


def orthonormal(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, dtype=dtype)).Q


def padded(basis: Tensor, columns: int) -> Tensor:
    """``basis`` with zero columns up to ``columns``."""
    return torch.cat([basis, basis.new_zeros(len(basis), columns - basis.shape[1])], dim=1)


def best_of_rank(matrix: Tensor, rank: int) -> Tensor:
    """Eckart and Young."""
    P, sigma, Qh = torch.linalg.svd(matrix, full_matrices=False)
    return (P[:, :rank] * sigma[:rank]) @ Qh[:rank]


def rank_within_tau(sigma: Tensor, tau: float, cap: int) -> int:
    """The smallest rank, from 1, whose dropped tail is at most tau times the norm, one rank after the other."""
    return next((rank for rank in range(1, cap) if sigma[rank:].norm() <= tau * sigma.norm()), cap)


def best_within_tau(matrix: Tensor, tau: float, cap: int) -> Tensor:
    return best_of_rank(matrix, rank_within_tau(torch.linalg.svdvals(matrix), tau, cap))


def bought_one_by_one(
    sigmas: list[list[float]], ranks: list[int], costs: list[int], budget: int, min_ranks: list[int]
) -> list[int]:
    """Ranks within a budget: by descending energy a parameter, each while it fits, of one adapter only in order."""
    chosen = list(min_ranks)
    left = budget - sum(rank * cost for rank, cost in zip(chosen, costs, strict=True))
    offers = [
        (sigmas[i][rank] ** 2 / costs[i], i, rank) for i in range(len(ranks)) for rank in range(chosen[i], ranks[i])
    ]
    for _, i, rank in sorted(offers, key=lambda offer: -offer[0]):
        if rank == chosen[i] and costs[i] <= left:
            chosen[i] += 1
            left -= costs[i]
    return chosen


def tangent_projection(G: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """P(W) G for live bases U and V."""
    return U @ U.T @ G + G @ V @ V.T - U @ U.T @ G @ V @ V.T


def one_layer(m: int, n: int, init_rank: int, max_rank: int, dtype: torch.dtype = torch.float64, **settings: object):
    """A model of one bias-free layer of zero weight, so that its effective weight is the update alone."""
    layer = nn.Linear(n, m, bias=False, dtype=dtype)
    nn.init.zeros_(layer.weight)
    model = nn.Sequential(layer)
    adapter = inject_adapters(model, AdapterConfig(init_rank=init_rank, max_rank=max_rank))["0"]
    return model, adapter, RankAdaptiveIntegrator(model, **settings)


def set_point(adapter, U: Tensor, sigma: Tensor, V: Tensor) -> None:
    """Put an adapter at U diag(sigma) V^T."""
    R = adapter.max_rank
    with torch.no_grad():
        adapter.U.copy_(padded(U, R))
        adapter.V.copy_(padded(V, R))
        adapter.S.zero_()
        adapter.S[: len(sigma), : len(sigma)] = torch.diag(sigma)
    adapter.rank = len(sigma)
