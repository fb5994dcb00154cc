r"""Find new directions: what probes have gathered outside of the bases, and which of it is worth a rank.

A retraction that augments and judges at once is blind to first order: beside a point with smallest singular value s,
the two increments ``K = k q^T`` and ``L = l p^T`` outside of the bases make a singular value of at most
``|k| |l| / s``, the product of two steps. The part of the gradient outside of *both* bases is not even seen. Probes are
columns of the bases that see it; what they gather from one retraction to the next is of first order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from geolora_pl.math.decomposition import Decomposition, first, project_out, svd_of_product
from geolora_pl.math.ranks import ranks_by_tau
from geolora_pl.math.transport import outside_tangent_space

_MEMORY = 0.8  # part of what the probe of a direction has gathered that counts at the next retraction as well
_GROWTH = 1.25  # factor by which a direction's share of the update must grow from one retraction to the next to stay
_OUTSIDE = 0.99  # norm that is left of a candidate outside of the basis; below it the singular vector is one of zero


def candidates(
    U: Tensor, V: Tensor, K: Tensor, L: Tensor, probes: int, U_kept: Tensor, V_kept: Tensor
) -> Decomposition:
    r"""Singular triplets of what the probes have gathered outside of the old bases and of those that are kept.

    .. math:: P_U^\perp \left( K_p V_p^T + U_p L_p^T \right) P_V^\perp

    Args:
        U: (..., m, p + R), the old basis with its probes.
        V: (..., n, p + R), likewise.
        K: (..., m, p + R), the increments since the last retraction.
        L: (..., n, p + R), likewise.
        probes: The number p of probes, at least 0.
        U_kept: (..., m, c), the leading columns of the new basis, then zeros.
        V_kept: (..., n, c), likewise.

    Returns:
        At most 2 p triplets.
    """
    K, L = outside_tangent_space(K, L, U, V, probes)
    left = torch.cat([K[..., :probes], U[..., :probes]], dim=-1)
    right = torch.cat([V[..., :probes], L[..., :probes]], dim=-1)
    return svd_of_product(_outside(left, U_kept), _outside(right, V_kept), 2 * probes)


def worth_a_rank(sigma: Tensor, new: Tensor, tau: float, resolution: float) -> Tensor:
    """Whether tau would keep a new direction beside the singular values of the point.

    Args:
        sigma: (..., k), all singular values of the point.
        new: (..., c), those of the candidates.
        tau: In [0, 1).
        resolution: From :func:`~geolora_pl.math.ranks.resolution`.

    Returns:
        (..., c), bool.

    Example:
        >>> worth_a_rank(torch.tensor([4.0, 1.0]), torch.tensor([3.0, 0.5]), tau=0.3, resolution=1e-6)
        tensor([ True, False])
    """
    k, total = sigma.shape[-1], sigma.shape[-1] + new.shape[-1]
    both, order = torch.cat([sigma, new], dim=-1).sort(descending=True, stable=True)
    rank = ranks_by_tau(both, tau, resolution, 0, total)
    return order.argsort()[..., k:] < rank[..., None]


def still_growing(sigma: Tensor, before: Tensor, ranks: Tensor, present: Tensor) -> Tensor:
    """How many singular values to keep where those beyond ``ranks`` that are next in line still grow.

    A direction that has just been taken in starts from zero, and so tau would drop it before it can show what it is
    worth. It stays as long as its share of the update grows by a quarter from one retraction to the next: if its
    coefficient grows steadily, for four of them, and if it wanders as noise does, for one or two.

    Args:
        sigma: (B, k), descending, of the point.
        before: (B, c), descending, after the last retraction, c at most k.
        ranks: (B,), int64, what tau would keep.
        present: (B,), int64, how many directions there were before.

    Returns:
        (B,), int64, at most ``present``, or ``ranks`` where that is more.

    Example:
        >>> sigma, before = torch.tensor([[4.0, 0.4, 0.3]]), torch.tensor([[3.0, 0.0, 0.0]])
        >>> still_growing(sigma, before, ranks=torch.tensor([1]), present=torch.tensor([2]))
        tensor([2])
    """
    norm, norm_before = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (sigma, before))
    c = before.shape[-1]
    grows = (sigma[..., :c] * norm_before > _GROWTH * before * norm) & first(present, c)
    return torch.maximum(ranks, (grows | first(ranks, c)).to(torch.int64).cumprod(-1).sum(-1))


def remembered(new: Decomposition, U: Tensor, V: Tensor) -> Tensor:
    """What the new probes know of a direction already, as the coefficients of ``U_p E V_p^T``.

    Args:
        new: The candidates, from :func:`candidates`.
        U: (B, m, p), the new probes.
        V: (B, n, p), the new probes.

    Returns:
        E (B, p, p).
    """
    return _MEMORY * (U.mT @ new.U * new.sigma[..., None, :]) @ (new.V.mT @ V)


def new_basis(
    kept: Tensor, ranks: Tensor, new: Tensor, admitted: Tensor, gaussian: Tensor, columns: int, room: int
) -> Tensor:
    """A basis of the columns that are kept, then those that are admitted, with new probes in front.

    Half of the probes, rounded up, are the candidates next in line, which a few more steps may prove; the others are
    random, so that no direction stays unseen. A singular vector of zero may be anything, so one that is not outside of
    the basis is replaced by a random one; those that are outside are then independent.

    Args:
        kept: (B, m, c), its leading ``ranks`` columns are orthonormal and the others zero.
        ranks: (B,), int64.
        new: (B, m, 2 p), singular vectors of the candidates, the largest first.
        admitted: (B,), int64, how many of them become columns of the basis, at most 2 p.
        gaussian: (B, m, 3 p), random numbers.
        columns: R, at least ``ranks + admitted``.
        room: The most columns that are not zero, the smaller side of the matrix; the last probes are left out.

    Returns:
        (B, m, p + R).
    """
    probes = gaussian.shape[-1] // 3
    c = min(kept.shape[-1], columns)
    basis = F.pad(kept[..., :c], (probes, columns - c))
    if not probes:
        return basis
    j = torch.arange(3 * probes, device=kept.device)
    end = admitted[:, None] + (probes + 1) // 2
    in_line, random = _outside(F.pad(new, (0, 3 * probes - new.shape[-1])), kept), _outside(gaussian, kept)
    fresh = (j < end)[:, None, :] & (torch.linalg.vector_norm(in_line, dim=-2, keepdim=True) > _OUTSIDE)
    Q = torch.linalg.qr(torch.where(fresh, in_line, random)).Q
    Q = F.pad(Q, (0, 3 * probes - Q.shape[-1]))
    used = j < torch.minimum(admitted + probes, room - ranks)[:, None]
    place = torch.where(j < admitted[:, None], probes + ranks[:, None] + j, j - admitted[:, None])
    places = F.one_hot(place.clamp(0, probes + columns - 1), probes + columns) * used[..., None]
    return basis + Q @ places.to(Q.dtype)


def _outside(matrix: Tensor, basis: Tensor) -> Tensor:
    """The part outside of the span of a basis; twice, so that what is small is orthogonal to the last digit as well."""
    return project_out(project_out(matrix, basis), basis)
