"""Carry the moments of an optimizer from the old bases to the new ones."""

from __future__ import annotations

from torch import Tensor

from geolora_pl.math.decomposition import plus_product, project_out


def transport_first_moment(
    m_K: Tensor, m_L: Tensor, U: Tensor, V: Tensor, U_new: Tensor, V_new: Tensor, probes: int = 0
) -> tuple[Tensor, Tensor]:
    r"""Carry a tangent vector to new bases by orthogonal projection onto the new tangent space.

    The pair is one vector ``xi = m_K V^T + U m_L^T``. In the new coordinates

    .. math::
        m_K' = m_K (V^T V') + U (m_L^T V'), \qquad
        m_L' = (I - V' V'^T) \left( m_L (U^T U') + V (m_K^T U') \right),

    which is the best approximation of xi in the tangent space at U', V'. With probes, :math:`V' V'^T` is that of the
    live columns alone. What probes have gathered inside of the tangent space is there already, and so only what lies
    outside of it counts.

    Args:
        m_K: (..., m, p + R), coordinates in V.
        m_L: (..., n, p + R), coordinates in U.
        U: (..., m, p + R), the old basis.
        V: (..., n, p + R), the old basis.
        U_new: (..., m, p + R).
        V_new: (..., n, p + R).
        probes: The number p of probes.

    Returns:
        m_K' (..., m, p + R) and m_L' (..., n, p + R).
    """
    of_U, of_V = U.mT @ U_new, V.mT @ V_new
    of_K, of_L = m_K.mT @ U_new, m_L.mT @ V_new
    inside = of_L.mT @ of_U  # the part of m_L of_U + V of_K that lies in V', in its coordinates
    if probes:  # what outside_tangent_space removes, but in coordinates, which are much smaller
        K_inside = U[..., probes:].mT @ m_K[..., :probes]
        L_inside = V.mT @ m_L[..., :probes]
        of_K[..., :probes, :] -= K_inside.mT @ of_U[..., probes:, :]
        of_L[..., :probes, :] -= L_inside.mT @ of_V
        of_L[..., probes:, :] -= K_inside @ of_V[..., :probes, :]
        of_K -= L_inside @ of_U[..., :probes, :]
    inside += of_V.mT @ of_K
    new_K = plus_product(m_K @ of_V, U, of_L)
    new_L = plus_product(plus_product(m_L @ of_U, V, of_K), V_new[..., probes:], inside[..., probes:, :], -1)
    return new_K, new_L


def outside_tangent_space(K: Tensor, L: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    r"""Remove from what probes have gathered all that the live columns hold as well.

    Of the gradient G the probes ``U_p``, ``V_p`` see ``G V_p`` and ``G^T U_p``. The live columns of the bases U and V
    hold ``U U^T G`` and ``G V V^T``, and the probes of K have ``U_p U_p^T G V_p V_p^T``; so there remain

    .. math:: (I - U U^T) \, G V_p, \qquad (I - V V^T - V_p V_p^T) \, G^T U_p

    Args:
        K: (..., m, p), the probes' columns.
        L: (..., n, p), the probes' columns.
        U: (..., m, p + R), with the p probes in front.
        V: (..., n, p + R).

    Returns:
        The columns of K and L.
    """
    return project_out(K, U[..., K.shape[-1] :]), project_out(L, V)


def transport_second_moment(v: Tensor, basis: Tensor, basis_new: Tensor) -> Tensor:
    r"""Carry elementwise second moments to a new basis of their columns.

    A column of the new basis is a combination of the old ones with coefficients ``C = basis^T basis_new``; for
    uncorrelated entries its second moment is ``v (C * C)``. What a new direction does not inherit,
    ``1 - sum_a C_aj^2``, it takes from the mean of its row, so that it neither starts at zero (a step of many lr)
    nor at a constant of another scale.

    Args:
        v: (..., d, R), at least 0; what it holds in unused columns does not count.
        basis: (..., e, R), old, orthonormal columns, then zeros.
        basis_new: (..., e, R).

    Returns:
        (..., d, R), at least 0 and zero in the unused columns of the new basis.
    """
    inherited = (basis.mT @ basis_new).square()
    live, live_new = (b.square().sum(-2, keepdim=True) for b in (basis, basis_new))  # 1 for a live column, else 0
    seed = (v * live).sum(-1, keepdim=True) / live.sum(-1, keepdim=True).clamp_min(1)
    return v @ inherited + seed * (live_new - inherited.sum(-2, keepdim=True)).clamp_min(0)
