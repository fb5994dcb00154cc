"""QR by the Gram matrix and its Cholesky factor: large products, where Householder's QR is a chain of small steps."""

from __future__ import annotations

import torch
from torch import Tensor

TALL = 4  # a matrix with so many times as many rows as columns has a Gram matrix that is much smaller than itself
householder = torch.linalg.qr


def gram_cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Q and R of tall matrices by two rounds of Cholesky's factorisation of the Gram matrix, in float64.

    A column that depends on the columns before it has no direction in Q, which is then not orthonormal. No number is
    read from the device. Other matrices are left to Householder's QR.

    Args:
        matrix: (..., m, k).

    Returns:
        Q (..., m, k), orthonormal if the columns are independent, and R (..., k, k), upper triangular, with A = Q R.
    """
    if matrix.shape[-2] < TALL * matrix.shape[-1]:
        Q, R = householder(matrix)
        return Q, R
    Q, R = _once(matrix.double())
    Q, correction = _once(Q)
    return Q.to(matrix.dtype), (correction @ R).to(matrix.dtype)


def _once(matrix: Tensor) -> tuple[Tensor, Tensor]:
    gram = matrix.mT @ matrix
    shift = torch.finfo(gram.dtype).eps * gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    shifted = gram + torch.diag_embed(shift[..., None].expand(gram.shape[:-1]))
    R, _ = torch.linalg.cholesky_ex(shifted, upper=True)  # unlike cholesky it does not look whether it has succeeded
    return torch.linalg.solve_triangular(R, matrix, upper=True, left=False), R
