r"""The math of GeoLoRA on plain tensors: no modules, no state.

Everything is batched over leading dimensions. Shapes, everywhere in the package:

========  =========  ===========================================================================
``U``     (m, p + R)  orthonormal basis of the output side, m = out features
``V``     (n, p + R)  orthonormal basis of the input side, n = in features
``S``     (R, R)     coefficients; diagonal after a retraction
``K, L``  (m, p + R), (n, p + R)  the pending tangent step ``K V^T + U L^T``
``R``     --         allocated columns (``max_rank``); the columns beyond the live rank are zero
``p``     --         probes: the first columns of U, V, K and L, which take no part in the point
========  =========  ===========================================================================

U is on the output side, as in StelLA; the authors of GeoLoRA put it on the input side. The number of probes follows
from the shapes, and without probes all factors have R columns. ``decompose`` and whatever else speaks of a point
takes the factors :func:`without_probes`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from geolora_pl.math.precision import working_dtype

Factors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # U, S, V, K and L


class Decomposition(NamedTuple):
    """Leading singular triplets of a point plus its pending step, before any truncation.

    ``U`` is (m, c) and ``V`` (n, c), orthonormal in every column; ``sigma`` (k,) holds *all* singular values in
    descending order, k = min(m, n, 2 R) >= c, so that the tail is known when the rank is chosen.
    """

    U: Tensor
    sigma: Tensor
    V: Tensor


def computed_columns(rank: int, max_rank: int, probes: int = 0, multiple: int = 4) -> int:
    """How many of ``max_rank`` columns to compute with: those of the live rank, and with the probes a multiple of 4.

    Example:
        >>> computed_columns(0, 16), computed_columns(9, 64), computed_columns(9, 12), computed_columns(6, 16, probes=2)
        (4, 12, 12, 6)
    """
    return min(max_rank, -(-(max(1, rank) + probes) // multiple) * multiple - probes)


def without_probes(U: Tensor, S: Tensor, V: Tensor, K: Tensor, L: Tensor) -> Factors:
    """The factors of the point and of its pending step alone, as views.

    Example:
        >>> U, S, V, K, L = (torch.zeros(rows, columns) for rows, columns in ((6, 5), (3, 3), (4, 5), (6, 5), (4, 5)))
        >>> [tuple(factor.shape) for factor in without_probes(U, S, V, K, L)]
        [(6, 3), (3, 3), (4, 3), (6, 3), (4, 3)]
    """
    probes = U.shape[-1] - S.shape[-1]
    return U[..., probes:], S, V[..., probes:], K[..., probes:], L[..., probes:]


def factored(U: Tensor, S: Tensor, V: Tensor, K: Tensor, L: Tensor) -> tuple[Tensor, Tensor]:
    r"""Write the point plus its pending step as one product.

    .. math:: U S V^T + K V^T + U L^T = A B^T, \qquad A = [U S + K \mid U], \quad B = [V \mid L]

    With probes A and B have their columns as well, and what K and L hold there counts as zero.

    Args:
        U: (..., m, p + R).
        S: (..., R, R).
        V: (..., n, p + R).
        K: (..., m, p + R).
        L: (..., n, p + R).

    Returns:
        A (..., m, 2 (p + R)) and B (..., n, 2 (p + R)).
    """
    if not (probes := U.shape[-1] - S.shape[-1]):
        return torch.cat([plus_product(K, U, S), U], dim=-1), torch.cat([V, L], dim=-1)
    none_K, none_L = torch.zeros_like(K[..., :probes]), torch.zeros_like(L[..., :probes])
    U_live, _, _, K_live, L_live = without_probes(U, S, V, K, L)
    A = torch.cat([none_K, plus_product(K_live, U_live, S), U], dim=-1)
    return A, torch.cat([V, none_L, L_live], dim=-1)


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


def first(counts: Tensor, columns: int) -> Tensor:
    """Which of so many columns are among the first ``counts`` (...): (..., columns), bool."""
    return torch.arange(columns, device=counts.device) < counts[..., None]


def project_out(matrix: Tensor, basis: Tensor) -> Tensor:
    """Remove from the columns of ``matrix`` (..., n, R) their part in the span of ``basis`` (..., n, R)."""
    return plus_product(matrix, basis, basis.mT @ matrix, alpha=-1)


def plus_product(matrix: Tensor, left: Tensor, right: Tensor, alpha: float = 1) -> Tensor:
    """``matrix + alpha left right``, in one call without a sum of its own for a matrix and for a batch of them."""
    if matrix.dim() == 2:  # every layer forms this in every step
        return torch.addmm(matrix, left, right, alpha=alpha)
    if matrix.dim() == left.dim() == 3:
        return torch.baddbmm(matrix, left, right, alpha=alpha)
    return matrix + alpha * (left @ right)


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
