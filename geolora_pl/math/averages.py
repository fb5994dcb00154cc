"""The mean of low-rank updates as one low-rank update."""

from __future__ import annotations

import torch
from torch import Tensor

from geolora_pl.math.decomposition import Decomposition, Factors, plus_product, svd_of_product


def mean_update(A: Tensor, B: Tensor, share: float, since: Factors, columns: int) -> Decomposition:
    r"""Singular value decomposition of a mean that was begun in other bases.

    With the mean ``A B^T`` before the bases U, V and the weight a that it still has, the weights of the later updates
    add up to ``1 - a``. K and L are the later increments, each times its weight, so that the mean is

    .. math::
        a A B^T + ((1 - a) U S + K) V^T + U L^T
        = \left[ a A \mid (1 - a) U S + K \mid U \right] \left[ B \mid V \mid L \right]^T

    It has up to 3 R directions; its best approximation by R of them are the leading singular triplets.

    Args:
        A: (..., m, R).
        B: (..., n, R).
        share: The weight a, in [0, 1].
        since: U (..., m, R), S (..., R, R), V (..., n, R) and the sums K (..., m, R) and L (..., n, R).
        columns: How many singular vectors to return; no more than there are.

    Returns:
        The leading singular vectors, and all singular values.

    Example:
        >>> U = V = torch.eye(4)[:, :1]  # the mean of an update of 2 and a later one of 4, in other bases
        >>> A = B = torch.eye(4)[:, 1:2]
        >>> since = (U, torch.full((1, 1), 4.0), V, torch.zeros(4, 1), torch.zeros(4, 1))
        >>> mean_update(2 * A, B, 0.75, since, columns=1).sigma
        tensor([1.5000, 1.0000, 0.0000])
    """
    U, S, V, K, L = since
    left = torch.cat([share * A, plus_product(K, U, (1 - share) * S), U], dim=-1)
    return svd_of_product(left, torch.cat([B, V, L], dim=-1), columns)
