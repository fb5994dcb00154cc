r"""The math of GeoLoRA on plain tensors: no modules, no state.

Everything is batched over leading dimensions. Shapes, everywhere in the package:

========  =========  ===========================================================================
``U``     (m, R)     orthonormal basis of the output side, m = out features
``V``     (n, R)     orthonormal basis of the input side, n = in features
``S``     (R, R)     coefficients; diagonal after a retraction
``K, L``  (m, R), (n, R)  the pending tangent step ``K V^T + U L^T``
``R``     --         allocated columns (``max_rank``); the columns beyond the live rank are zero
========  =========  ===========================================================================

U is on the output side, as in StelLA; the authors of GeoLoRA put it on the input side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from geolora_pl.math.precision import summing_dtype, working_dtype


class Decomposition(NamedTuple):
    """Leading singular triplets of a point plus its pending step, before any truncation.

    ``U`` is (m, c) and ``V`` (n, c), orthonormal in every column; ``sigma`` (k,) holds *all* singular values in
    descending order, k = min(m, n, 2 R) >= c, so that the tail is known when the rank is chosen.
    """

    U: Tensor
    sigma: Tensor
    V: Tensor


def computed_columns(rank: int, max_rank: int) -> int:
    """How many of ``max_rank`` columns are computed with: those of the live rank, up to the next multiple of 8.

    Example:
        >>> computed_columns(0, 16), computed_columns(9, 64), computed_columns(9, 12)
        (8, 16, 12)
    """
    return min(max_rank, max(8, -(-rank // 8) * 8))


def factored(U: Tensor, S: Tensor, V: Tensor, K: Tensor, L: Tensor) -> tuple[Tensor, Tensor]:
    r"""Write the point plus its pending step as one product.

    .. math:: U S V^T + K V^T + U L^T = A B^T, \qquad A = [U S + K \mid U], \quad B = [V \mid L]

    Args:
        U: (..., m, R).
        S: (..., R, R).
        V: (..., n, R).
        K: (..., m, R).
        L: (..., n, R).

    Returns:
        A (..., m, 2 R) and B (..., n, 2 R).
    """
    return torch.cat([_plus_product(K, U, S), U], dim=-1), torch.cat([V, L], dim=-1)


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reduced singular value decomposition that tries another driver and then float64 before it gives up.

    Args:
        matrix: (..., k, l).

    Returns:
        ``P`` (..., k, q), ``sigma`` (..., q) descending and ``Qh`` (..., q, l) with q = min(k, l).

    Raises:
        torch.linalg.LinAlgError: No attempt converged, as with an infinite or undefined entry.
    """
    try:
        return _svd(matrix)
    except torch.linalg.LinAlgError:
        pass
    if matrix.is_cuda:  # the one device where torch offers a choice: QR iteration instead of Jacobi
        try:
            return _svd(matrix, driver="gesvd")
        except torch.linalg.LinAlgError:
            pass
    P, sigma, Qh = _svd(matrix.double())
    return P.to(matrix.dtype), sigma.to(matrix.dtype), Qh.to(matrix.dtype)


def _svd(matrix: Tensor, driver: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    P, sigma, Qh = torch.linalg.svd(matrix, full_matrices=False, driver=driver)
    return P, sigma, Qh


def decompose(U: Tensor, S: Tensor, V: Tensor, K: Tensor, L: Tensor, columns: int | None = None) -> Decomposition:
    r"""Singular value decomposition of ``U S V^T + K V^T + U L^T`` at the cost of its small core.

    This is augmentation and assembly (Algorithm 1 of GeoLoRA, steps 3 to 5 before the truncation) in one: with
    the QR factorisations ``A = Q_A R_A`` and ``B = Q_B R_B`` of :func:`factored`, the product is
    ``Q_A (R_A R_B^T) Q_B^T``, and the core is at most 2 R x 2 R. It is exact for every K and L, also where L keeps a
    part in the span of V. Householder's QR is orthonormal to rounding whatever the columns are: zero, dependent or of
    very different size; what is dependent shows as a singular value of zero, and :func:`ranks_by_tau` drops it.

    Args:
        U: (..., m, R), orthonormal columns, then zeros.
        S: (..., R, R).
        V: (..., n, R), orthonormal columns, then zeros.
        K: (..., m, R).
        L: (..., n, R).
        columns: How many singular vectors to return, at most 2 R; by default R.

    Returns:
        The leading singular vectors and all singular values, in float32, or float64 for float64 factors.

    Example:
        >>> U, V = torch.eye(5)[:, :2], torch.eye(4)[:, :2]
        >>> step = decompose(U, torch.diag(torch.tensor([3.0, 1.0])), V, torch.zeros(5, 2), torch.zeros(4, 2))
        >>> step.sigma
        tensor([3., 1., 0., 0.])
    """
    dtype = working_dtype(U.dtype)
    A, B = factored(*(factor.to(dtype) for factor in (U, S, V, K, L)))
    return svd_of_product(A, B, U.shape[-1] if columns is None else columns)


def svd_of_product(A: Tensor, B: Tensor, columns: int) -> Decomposition:
    """Singular value decomposition of ``A B^T`` by QR of both sides and the SVD of the small core.

    Args:
        A: (..., m, k).
        B: (..., n, k).
        columns: How many singular vectors to return, at least 0; no more than there are.

    Returns:
        The leading singular vectors, and all singular values.
    """
    Q_A, R_A = torch.linalg.qr(A)
    Q_B, R_B = torch.linalg.qr(B)
    P, sigma, Qh = svd(R_A @ R_B.mT)
    return Decomposition(Q_A @ P[..., :columns], sigma, Q_B @ Qh.mT[..., :columns])


def truncate(step: Decomposition, ranks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the leading ``ranks`` triplets of a decomposition; the columns beyond them become exactly zero.

    Args:
        step: From :func:`decompose`.
        ranks: (...), int, one a matrix of the batch, in [0, c].

    Returns:
        U (..., m, c), S (..., c, c) diagonal, V (..., n, c).
    """
    c = step.U.shape[-1]
    keep = (torch.arange(c, device=ranks.device) < ranks[..., None]).to(step.U.dtype)  # a product is the fastest mask
    columns = keep[..., None, :]
    return step.U * columns, torch.diag_embed(step.sigma[..., :c] * keep), step.V * columns


def resolution(m: int, n: int, dtype: torch.dtype) -> float:
    """Relative size below which a singular value of an (m, n) retraction is rounding and no direction.

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
    """Share a budget of parameters among adapters so that the energy kept a parameter is largest.

    The floors are paid first, inside the budget. Then singular triplets are bought in descending order of
    ``sigma^2 / cost``, each while it fits; of one adapter only in order.

    Up to the first that does not fit this is a cumulative sum. From there on all of the cost of that one, and dearer
    ones, are out of reach, for what is left only shrinks. So every round of sums settles one cost at least, and as
    many rounds as there are costs buy what one purchase after the other would, without a look at any number.

    Args:
        sigmas: For each group, adapters for which a rank costs the same: their singular values (B, k), descending.
            Groups may be on different devices.
        ranks: (B,), int64, most that each adapter may have, at most k, as after :func:`ranks_by_tau`.
        costs: Parameters that one rank of each adapter of the group takes, ``m + n``.
        budget: Parameters in all, at least what the floors cost.
        min_ranks: (B,), int64, least that each adapter must have, at most its entry of ``ranks``.

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
    order = torch.cat(energies).argsort(descending=True, stable=True)  # stable: one adapter's stay in order
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


def transport_first_moment(
    m_K: Tensor, m_L: Tensor, U: Tensor, V: Tensor, U_new: Tensor, V_new: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Carry a tangent vector to new bases by orthogonal projection onto the new tangent space.

    The pair is one vector ``xi = m_K V^T + U m_L^T``. In the new coordinates

    .. math::
        m_K' = m_K (V^T V') + U (m_L^T V'), \qquad
        m_L' = (I - V' V'^T) \left( m_L (U^T U') + V (m_K^T U') \right),

    which is the best approximation of xi there is in the tangent space at U', V'.

    Args:
        m_K: (..., m, R), coordinates in V.
        m_L: (..., n, R), coordinates in U.
        U: (..., m, R), the old basis.
        V: (..., n, R), the old basis.
        U_new: (..., m, R).
        V_new: (..., n, R).

    Returns:
        m_K' (..., m, R) and m_L' (..., n, R).
    """
    new_K = m_K @ (V.mT @ V_new) + U @ (m_L.mT @ V_new)
    new_L = m_L @ (U.mT @ U_new) + V @ (m_K.mT @ U_new)
    return new_K, project_out(new_L, V_new)


def transport_second_moment(v: Tensor, basis: Tensor, basis_new: Tensor) -> Tensor:
    r"""Carry elementwise second moments to a new basis of their columns.

    A column of the new basis is a combination of the old ones with coefficients ``C = basis^T basis_new``; for
    uncorrelated entries its second moment is ``v (C * C)``. What a new direction does not inherit,
    ``1 - sum_a C_aj^2``, it takes from the mean of its row, so that it neither starts at zero (a step of many lr)
    nor at a constant of another scale.

    Args:
        v: (..., d, R), at least 0; zero in unused columns.
        basis: (..., e, R), old, orthonormal columns, then zeros.
        basis_new: (..., e, R).

    Returns:
        (..., d, R), at least 0 and zero in the unused columns of the new basis.
    """
    inherited = (basis.mT @ basis_new).square()
    live, live_new = (b.square().sum(-2, keepdim=True) for b in (basis, basis_new))  # 1 for a live column, else 0
    seed = v.sum(-1, keepdim=True) / live.sum(-1, keepdim=True).clamp_min(1)
    return v @ inherited + seed * (live_new - inherited.sum(-2, keepdim=True)).clamp_min(0)


def project_out(matrix: Tensor, basis: Tensor) -> Tensor:
    """Remove from the columns of ``matrix`` (..., n, R) their part in the span of ``basis`` (..., n, R)."""
    return _plus_product(matrix, basis, basis.mT @ matrix, alpha=-1)


def _plus_product(matrix: Tensor, left: Tensor, right: Tensor, alpha: float = 1) -> Tensor:
    """``matrix + alpha left right``; of single matrices, as in every layer of a step, in one call."""
    return torch.addmm(matrix, left, right, alpha=alpha) if matrix.dim() == 2 else matrix + alpha * (left @ right)


def orthonormality_defect(basis: Tensor) -> Tensor:
    """Frobenius norm of ``basis^T basis - I`` over the columns that are not exactly zero.

    Args:
        basis: (..., n, R).

    Returns:
        (...), at least 0.

    Example:
        >>> orthonormality_defect(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        tensor(0.)
    """
    live = (basis != 0).any(-2).to(basis.dtype)
    defect: Tensor = torch.linalg.matrix_norm(basis.mT @ basis - torch.diag_embed(live))
    return defect
