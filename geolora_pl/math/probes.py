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

from geolora_pl.math.decomposition import Decomposition, first, project_out, svd
from geolora_pl.math.ranks import ranks_by_tau
from geolora_pl.math.transport import outside_tangent_space

_MEMORY = 0.8  # part of what the probe of a direction has gathered that counts at the next retraction as well
_GROWTH = 1.25  # factor by which a direction's share of the update must grow from one retraction to the next to stay


def directions(
    old: tuple[Tensor, Tensor],
    gathered: tuple[Tensor, Tensor],
    kept: tuple[Tensor, Tensor],
    noise: tuple[Tensor, Tensor],
    room: Tensor,
    least: Tensor,
) -> Decomposition:
    r"""Directions outside of the bases, first those in which the probes have gathered most, then random ones.

    What has been gathered is :math:`P_U^\perp (K_p V_p^T + U_p L_p^T) P_V^\perp`, of rank 2 p at most, where the
    projections leave out the old live columns and those that the point keeps. Random directions make it 3 p, and
    they also stand in for whatever is degenerate.

    Args:
        old: The old bases with their probes, U (B, m, p + R) and V (B, n, p + R).
        gathered: What the probes hold, their columns of K (B, m, p) and of L (B, n, p).
        kept: The columns that the point keeps, (B, m, c) and (B, n, c), then zeros.
        noise: Random numbers with a variance of 1 / m and 1 / n, of shape (..., m, 3 p) and (..., n, 3 p).
        room: (B,), int64, how many columns have a place beside those that are kept; the directions beyond are of no
            use.
        least: (B,), above 0, a size that does not count; ``sigma`` of a random direction.

    Returns:
        U (B, m, 3 p), sigma (B, 3 p) and V (B, n, 3 p), orthonormal and orthogonal to what is kept.
    """
    (U, V), (K, L) = old, gathered
    probes, columns = K.shape[-1], noise[0].shape[-1]
    K, L = outside_tangent_space(K, L, U, V)
    valid = first(room, columns)
    Q_U, R_U = _complement(torch.cat([K, U[..., :probes]], dim=-1), kept[0], noise[0], least, valid)
    Q_V, R_V = _complement(torch.cat([V[..., :probes], L], dim=-1), kept[1], noise[1], least, valid)
    of_random = valid & ~first(torch.full_like(room, 2 * probes), columns)
    P, sigma, Qh = svd(R_U @ R_V.mT + torch.diag_embed(of_random * least[:, None]))
    return Decomposition(Q_U @ P, sigma, Q_V @ Qh.mT)


def _complement(side: Tensor, kept: Tensor, noise: Tensor, least: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The QR factorisation of one side of a product outside of what is kept, completed by random directions.

    Noise of the size of rounding gives a column that is degenerate a random direction: QR would invent one for it that
    need not be orthogonal to what is kept.

    Returns:
        Q (B, m, 3 p) and of R the columns of the side, (B, 3 p, 2 p).
    """
    c = side.shape[-1]
    rounding = 4 * torch.finfo(side.dtype).eps * torch.linalg.vector_norm(side, dim=-2, keepdim=True)
    noise = noise.expand(len(side), -1, -1)
    columns = torch.cat([side + noise[..., :c] * (rounding + least[:, None, None]), noise[..., c:]], dim=-1)
    for _ in range(2):  # so that what is small is orthogonal to the last digit as well
        columns = project_out(columns, kept)
    Q, R = torch.linalg.qr(columns)
    missing = columns.shape[-1] - Q.shape[-1]  # where the matrix has fewer rows than that
    return F.pad(Q, (0, missing)), F.pad(R[..., :c], (0, 0, 0, missing)) * valid[..., None]


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
        room: (B,), int64, how many columns have a place beside those that are kept.
        probes: p.
        columns: c, how many columns there are to keep some of; the directions come after them.
        rank: R.

    Returns:
        Indices (B, p + R) of columns, int64, and whether each is used (B, p + R), bool.
    """
    known = (probes + 1) // 2
    i = torch.arange(probes, device=kept.device)
    random = torch.maximum(in_line, admitted + known)[:, None] + i - known
    of_probe = torch.where(i < known, admitted[:, None] + i, random)
    j = torch.arange(rank, device=kept.device)
    beyond = j - kept[:, None]
    of_column = torch.where(beyond < 0, j, columns + beyond)
    used = torch.cat([of_probe < room.clamp_max(3 * probes)[:, None], beyond < admitted[:, None]], dim=-1)
    source = torch.cat([columns + of_probe, of_column], dim=-1)
    return torch.where(used, source, 0), used


def new_basis(kept: Tensor, directions: Tensor, source: Tensor, used: Tensor) -> Tensor:
    """Put a basis together.

    Args:
        kept: (B, m, c).
        directions: (B, m, 3 p).
        source: From :func:`places`.
        used: From :func:`places`.

    Returns:
        (B, m, p + R).
    """
    index = source[:, None, :].expand(-1, kept.shape[-2], -1)
    return torch.cat([kept, directions], dim=-1).gather(-1, index) * used[:, None, :]


def remembered(sigma: Tensor, source: Tensor, used: Tensor, columns: int, least: Tensor) -> Tensor:
    """What the new probes know already: their columns of K are those of U times these coefficients.

    Args:
        sigma: (B, 3 p), from :func:`directions`.
        source: From :func:`places`, of the probes alone (B, p).
        used: From :func:`places`, likewise.
        columns: As for :func:`places`.
        least: As for :func:`directions`.

    Returns:
        (B, p).
    """
    known = sigma.gather(-1, (source - columns).clamp_min(0)) * used
    return _MEMORY * known * (known > 2 * least[:, None])
