"""Naive float64 oracles: dense matrices, no batching, no care for speed."""

import math

import torch
from torch import Tensor, nn

from geolora_pl import AdapterConfig, RankAdaptiveIntegrator, inject_adapters
from geolora_pl.math import decomposition


def orthonormal(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, dtype=dtype)).Q


def padded(basis: Tensor, columns: int) -> Tensor:
    """``basis`` with zero columns up to ``columns``."""
    return torch.cat([basis, basis.new_zeros(len(basis), columns - basis.shape[1])], dim=1)


def best_of_rank(matrix: Tensor, rank: int) -> Tensor:
    """Eckart and Young."""
    P, sigma, Qh = torch.linalg.svd(matrix, full_matrices=False)
    return (P[:, :rank] * sigma[:rank]) @ Qh[:rank]


def truncate(step: decomposition.Decomposition, ranks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the leading ``ranks`` triplets of a decomposition; the columns beyond them become exactly zero.

    Args:
        step: From ``decompose``.
        ranks: (...), int, one per matrix of the batch, in [0, c].

    Returns:
        U (..., m, c), S (..., c, c) diagonal, V (..., n, c).
    """
    c = step.U.shape[-1]
    keep = decomposition.first(ranks, c).to(step.U.dtype)
    columns = keep[..., None, :]
    return step.U * columns, torch.diag_embed(step.sigma[..., :c] * keep), step.V * columns


def rank_within_tau(sigma: Tensor, tau: float, cap: int) -> int:
    """The smallest rank, from 1, whose dropped tail is at most tau times the norm, one rank after the other."""
    return next((rank for rank in range(1, cap) if sigma[rank:].norm() <= tau * sigma.norm()), cap)


def best_within_tau(matrix: Tensor, tau: float, cap: int) -> Tensor:
    return best_of_rank(matrix, rank_within_tau(torch.linalg.svdvals(matrix), tau, cap))


def bought_one_by_one(
    sigmas: list[list[float]], ranks: list[int], costs: list[int], budget: int, min_ranks: list[int]
) -> list[int]:
    """Ranks within a budget: by descending energy per parameter, each while it fits, of one adapter only in order."""
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


def one_layer(
    m: int,
    n: int,
    init_rank: int,
    max_rank: int,
    dtype: torch.dtype = torch.float64,
    probes: int = 2,
    **settings: object,
):
    """A model of one bias-free layer of zero weight, so that its effective weight is the update alone."""
    layer = nn.Linear(n, m, bias=False, dtype=dtype)
    nn.init.zeros_(layer.weight)
    model = nn.Sequential(layer)
    adapter = inject_adapters(model, AdapterConfig(init_rank=init_rank, max_rank=max_rank, probes=probes))["0"]
    return model, adapter, RankAdaptiveIntegrator(model, **settings)


def set_point(adapter, U: Tensor, sigma: Tensor, V: Tensor) -> None:
    """Put an adapter at U diag(sigma) V^T, with random probes."""
    p = adapter.probes
    with torch.no_grad():
        for basis, live in ((adapter.U, U), (adapter.V, V)):
            probes = torch.linalg.qr(torch.cat([live, torch.randn(len(live), p, dtype=live.dtype)], 1)).Q
            basis.copy_(torch.cat([padded(probes[:, live.shape[1] :], p), padded(live, adapter.max_rank)], 1))
        adapter.S.zero_()
        adapter.S[: len(sigma), : len(sigma)] = torch.diag(sigma)
    adapter.rank = len(sigma)


class NaiveRiemannianAdam:
    """RiemannianAdam of one adapter, entry by entry where that helps, from the formulas of its docstring."""

    def __init__(self, K: Tensor, L: Tensor, geometry: str, lr: float, betas: tuple[float, float], eps: float) -> None:
        self.K, self.L = K.detach().clone(), L.detach().clone()
        self.geometry, self.lr, self.betas, self.eps = geometry, lr, betas, eps
        self.t = 0
        self.m, self.v = (torch.zeros(len(K) + len(L), K.shape[1], dtype=torch.float64) for _ in range(2))

    def step(self, G_K: Tensor, G_L: Tensor, weight_decay: float = 0.0) -> None:
        self.t += 1
        beta1, beta2 = self.betas
        G = torch.cat([G_K, G_L])
        self.m = beta1 * self.m + (1 - beta1) * G
        self.v = beta2 * self.v + (1 - beta2) * G**2  # of every entry; rows and adapters add theirs up
        m_hat, v_hat = self.m / (1 - beta1**self.t), self.v / (1 - beta2**self.t)
        step = self.lr * getattr(self, self.geometry)(G, m_hat, v_hat)
        for factor, part in zip((self.K, self.L), step.split([len(self.K), len(self.L)]), strict=True):
            factor.mul_(1 - self.lr * weight_decay).sub_(part)

    def rowwise(self, G: Tensor, m_hat: Tensor, v_hat: Tensor) -> Tensor:
        direction = torch.zeros_like(G)
        rows = 0
        for i in range(len(G)):
            rows += int(v_hat[i].sum() > 0)  # the rows that ever had a gradient
            if m_hat[i] @ G[i] > 0:
                direction[i] = m_hat[i] / (v_hat[i].sum().sqrt() + self.eps)
        return direction / math.sqrt(rows)

    def isotropic(self, G: Tensor, m_hat: Tensor, v_hat: Tensor) -> Tensor:
        return m_hat / (v_hat.sum().sqrt() + self.eps)

    def spectral(self, G: Tensor, m_hat: Tensor, v_hat: Tensor) -> Tensor:
        polar = []
        for momentum in m_hat.split([len(self.K), len(self.L)]):
            rank = int(torch.linalg.matrix_rank(momentum))
            P, _, Qh = torch.linalg.svd(momentum, full_matrices=False)
            polar.append(P[:, :rank] @ Qh[:rank])
        return torch.cat(polar) / torch.cat(polar).norm()

    def entrywise(self, G: Tensor, m_hat: Tensor, v_hat: Tensor) -> Tensor:
        return m_hat / (v_hat.sqrt() + self.eps) / math.sqrt(int((v_hat > 0).sum()))
