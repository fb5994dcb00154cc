r"""Find new directions: what probes have gathered outside of the bases, and which of it is worth a rank.

A retraction that augments and judges at once is blind to first order: beside a point with smallest singular value s,
the two increments ``K = k q^T`` and ``L = l p^T`` outside of the bases make a singular value of at most
``|k| |l| / s``, the product of two steps. The part of the gradient outside of *both* bases is not even seen. Probes are
columns of the bases that see it; what they gather from one retraction to the next is of first order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from geolora_pl.math.decomposition import first, project_out, svd
from geolora_pl.math.ranks import ranks_by_tau
from geolora_pl.math.transport import outside_tangent_space

_MEMORY = 0.8  # part of what the probe of a direction has gathered that counts at the next retraction as well
_NEGLIGIBLE = 1e-4  # relative size below which rounding has a say in a direction, so that it counts as unknown
_GROWTH = 1.25  # factor by which a direction's share of the update must grow from one retraction to the next to stay


class Augmentation(NamedTuple):
    """A point, its pending step and what its probes hold, in orthonormal coordinates that are common to all of them.

    Attributes:
        Q_U: (B, m, c), orthonormal, c = 2 R + 3 p or m if that is less.
        Q_V: (B, n, d), orthonormal.
        sigma: (B, k), all singular values of the point plus its pending step, descending, k at most 2 R.
        P_U: (B, c, k), the coordinates of its left singular vectors.
        P_V: (B, d, k), those of its right ones.
        R_U: (B, c, 2 R + 3 p), the coordinates of ``[U | K | K_p | U_p | random]``.
        R_V: (B, d, 2 R + 3 p), those of ``[V | L | V_p | L_p | random]``.
    """

    Q_U: Tensor
    Q_V: Tensor
    sigma: Tensor
    P_U: Tensor
    P_V: Tensor
    R_U: Tensor
    R_V: Tensor


def augment(
    U: Tensor, S: Tensor, V: Tensor, K: Tensor, L: Tensor, random: tuple[Tensor, Tensor] | None
) -> Augmentation:
    """Augment the bases by the pending step, by what the probes hold and by random directions, and decompose the point.

    This is Algorithm 1 of GeoLoRA, steps 3 to 5 before the truncation, and more columns in the same factorisations.

    Args:
        U: (B, m, p + R), with p probes in front.
        S: (B, R, R).
        V: (B, n, p + R).
        K: (B, m, p + R).
        L: (B, n, p + R).
        random: Numbers of shape (..., m, p) and (..., n, p); ``None`` to leave out the probes as well.
    """
    rank, probes = S.shape[-1], U.shape[-1] - S.shape[-1]
    of_U, of_V = [U[..., probes:], K[..., probes:]], [V[..., probes:], L[..., probes:]]
    if random is not None:
        more_U, more_V = (numbers.expand(len(U), -1, -1) for numbers in random)
        of_U += [K[..., :probes], U[..., :probes], more_U]
        of_V += [V[..., :probes], L[..., :probes], more_V]
    (Q_U, R_U), (Q_V, R_V) = torch.linalg.qr(torch.cat(of_U, dim=-1)), torch.linalg.qr(torch.cat(of_V, dim=-1))
    at_U, at_K = R_U[..., : 2 * rank, : 2 * rank].split(rank, dim=-1)
    at_V, at_L = R_V[..., : 2 * rank, : 2 * rank].split(rank, dim=-1)
    left, sigma, right = _triplets((at_U @ S + at_K) @ at_V.mT + at_U @ at_L.mT)
    P_U, P_V = (F.pad(x, (0, 0, 0, R.shape[-2] - x.shape[-2])) for x, R in ((left, R_U), (right, R_V)))
    return Augmentation(Q_U, Q_V, sigma, P_U, P_V, R_U, R_V)


class Directions(NamedTuple):
    """New directions in the coordinates of an :class:`Augmentation`, orthonormal and orthogonal to what is kept.

    Attributes:
        U: (B, c, 3 p).
        sigma: (B, 3 p), descending, how much the probes have gathered in each; 0 in random ones.
        V: (B, d, 3 p).
    """

    U: Tensor
    sigma: Tensor
    V: Tensor


def directions(at: Augmentation, probes: int, kept: Tensor) -> Directions:
    r"""Directions outside of what is kept: first those in which the probes have gathered something, then p random ones.

    What has been gathered is :math:`P_U^\perp (K_p V_p^T + U_p L_p^T) P_V^\perp`, of rank 2 p at most, where the
    projections leave out the old live columns and those that are kept. Where a side has no room for all, the directions
    beyond are of no use.

    Args:
        at: The augmentation.
        probes: The number p of probes.
        kept: (B,), int64, how many singular vectors of the point are kept.
    """
    if not probes:
        return Directions(at.P_U[..., :0], at.sigma[..., :0], at.P_V[..., :0])
    R = (at.R_U.shape[-1] - 3 * probes) // 2
    K, U_p, random_U = at.R_U[..., 2 * R :].split(probes, dim=-1)
    V_p, L, random_V = at.R_V[..., 2 * R :].split(probes, dim=-1)
    U, V = at.R_U[..., :R], at.R_V[..., :R]
    K, L = outside_tangent_space(K, L, torch.cat([U_p, U], dim=-1), torch.cat([V_p, V], dim=-1))
    keep = first(kept, at.sigma.shape[-1])[:, None]
    left = _outside(torch.cat([K, U_p], dim=-1), at.P_U * keep)
    right = _outside(torch.cat([V_p, L], dim=-1), at.P_V * keep)
    P_U, sigma, P_V = (x[..., : 2 * probes] for x in _triplets(left @ right.mT))
    least = _NEGLIGIBLE * torch.maximum(at.sigma[:, :1], sigma[:, :1])
    sigma = sigma * (sigma > least)
    found = (sigma > 0).sum(-1)
    U_new, V_new = _beside(at.P_U, kept, P_U, found, random_U), _beside(at.P_V, kept, P_V, found, random_V)
    return Directions(U_new, F.pad(sigma, (0, 3 * probes - sigma.shape[-1])), V_new)


def _triplets(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Left singular vectors, singular values, and right singular vectors as columns."""
    P, sigma, Qh = svd(matrix)
    return P, sigma, Qh.mT


def _outside(matrix: Tensor, basis: Tensor) -> Tensor:
    """The part outside of the span of a basis; twice, so that no rounding of large numbers is taken for a part."""
    return project_out(project_out(matrix, basis), basis)


def _beside(P: Tensor, kept: Tensor, vectors: Tensor, found: Tensor, random: Tensor) -> Tensor:
    """The leading ``found`` vectors and then the random ones, orthonormal and orthogonal to what is kept.

    One Householder factorisation of all that is in use, in this order, is orthonormal to rounding, also where hardly
    any room is left beside what is kept. Neither rounding nor what is degenerate has a say in the random ones, so two
    runs that differ by rounding have the same probes.

    Args:
        P: (B, c, k), orthonormal.
        kept: (B,), int64, how many columns of P are kept.
        vectors: (B, c, 2 p), singular vectors.
        found: (B,), int64, how many of them are known.
        random: (B, c, p).

    Returns:
        (B, c, 3 p); what comes after the random ones is of no use.
    """
    p = random.shape[-1]
    columns = torch.cat([P, vectors, random], dim=-1)
    counts = (kept, P.shape[-1]), (found, vectors.shape[-1]), (torch.full_like(found, p), p)
    in_use = torch.cat([first(count, most) for count, most in counts], dim=-1)
    order = in_use.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    Q, upper = torch.linalg.qr(columns.gather(-1, order[:, None, :].expand_as(columns)))
    signs = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(Q.dtype)  # which pair U with V
    new = kept[:, None] + torch.arange(3 * p, device=kept.device)
    return F.pad(Q * signs[..., None, :], (0, 3 * p)).gather(-1, new[:, None, :].expand(-1, Q.shape[-2], -1))


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


def places(
    kept: Tensor, admitted: Tensor, in_line: Tensor, room: Tensor, probes: int, columns: int, rank: int
) -> tuple[Tensor, Tensor]:
    """Where each column of the new bases comes from: the probes in front, then what is kept and what is admitted.

    Half of the probes, rounded up, are the directions next in line, which a few more steps may prove; the others are
    random, so that no direction stays unseen.

    Args:
        kept: (B,), int64, how many columns the point keeps.
        admitted: (B,), int64, how many of :func:`directions` become columns of the bases.
        in_line: (B,), int64, how many of them the probes have gathered; those after them are random.
        room: (B,), int64, how many of the directions have a place beside what was kept when they were chosen.
        probes: p.
        columns: c, how many columns there are to keep some of; the directions come after them.
        rank: R.

    Returns:
        Indices (B, p + R) of columns, int64, and whether each is used (B, p + R), bool.
    """
    known = (probes + 1) // 2
    i = torch.arange(probes, device=kept.device)
    most = room.clamp_max(3 * probes)
    random = torch.maximum(torch.minimum(in_line, most - probes + known), admitted + known)[:, None] + i - known
    of_probe = torch.where(i < known, admitted[:, None] + i, random)
    j = torch.arange(rank, device=kept.device)
    beyond = j - kept[:, None]
    of_column = torch.where(beyond < 0, j, columns + beyond)
    used = torch.cat([of_probe < most[:, None], beyond < admitted[:, None]], dim=-1)
    source = torch.cat([columns + of_probe, of_column], dim=-1)
    return torch.where(used, source, 0), used


def new_basis(Q: Tensor, kept: Tensor, new: Tensor, source: Tensor, used: Tensor) -> Tensor:
    """Put a basis together.

    Args:
        Q: (B, m, c), the coordinate system.
        kept: (B, c, k), coordinates of the singular vectors of the point.
        new: (B, c, 3 p), coordinates of the new directions.
        source: From :func:`places`.
        used: From :func:`places`.

    Returns:
        (B, m, p + R).
    """
    index = source[:, None, :].expand(-1, kept.shape[-2], -1)
    return Q @ (torch.cat([kept, new], dim=-1).gather(-1, index) * used[:, None, :])


def remembered(sigma: Tensor, source: Tensor, used: Tensor, columns: int) -> Tensor:
    """What the new probes know already: their columns of K are those of U times these coefficients.

    Args:
        sigma: (B, 3 p), from :func:`directions`.
        source: From :func:`places`, of the probes alone (B, p).
        used: From :func:`places`, of the probes alone (B, p).
        columns: As for :func:`places`.

    Returns:
        (B, p).
    """
    return _MEMORY * sigma.gather(-1, (source - columns).clamp_min(0)) * used
