"""A linear layer with its update as one function: fewer and better shaped products than the sum of its parts."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from geolora_pl.functional import factored, project_out
from geolora_pl.precision import exact_products


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None, factors: tuple[Tensor, ...], alpha: float) -> Tensor:
    r"""A frozen linear layer plus its update in tangent coordinates.

    .. math:: y = W_0 x + b + \alpha \left( (U S + K) V^T + U L^T \right) x

    The gradients are those of :class:`~geolora_pl.GeoLoRALinear`, to rounding: of U and S none, of L its part in the
    span of V removed. Nothing but ``x`` is kept for them. K and L cost four thin products of a rank each, two of which
    LoRA has as well; the rest of the update costs, by :func:`pays_to_merge`,

    * *merged*: one weight ``W_0 + alpha A B^T`` in the forward and one in the backward, or
    * *beside*: the thin products ``(x B) A^T`` and ``(dy A) B^T``, added to the base's own results in place.

    Thin products are formed as (rank, ...) matrices, in which BLAS is several times faster than in (..., rank) ones.

    Args:
        x: (..., n).
        weight: (m, n), frozen, of the dtype of ``x``.
        bias: (m,), of the dtype of ``x``.
        factors: U (m, w), S (w, w), V (n, w), K (m, w) and L (n, w), of any floating dtype.
        alpha: Scale of the update.

    Returns:
        (..., m).
    """
    merged = pays_to_merge(x, weight, factors[0])
    return FusedLinear.apply(x, weight, bias, *factors, alpha, merged)  # type: ignore[no-any-return,no-untyped-call]


def pays_to_merge(x: Tensor, weight: Tensor, U: Tensor) -> bool:
    r"""Whether one merged weight a step is cheaper than the update beside it, and as exact.

    For T rows of ``x``, merged takes ``4 w m n`` operations more than the base in the forward and in the backward,
    beside ``4 w T (m + n)`` in each (``benchmarks/products.py`` measures both). In low precision the small update would
    be rounded away in the sum, and a GPU may form float32 products in TF32.
    """
    m, n = weight.shape
    exact = x.dtype == torch.float64 or (x.dtype == torch.float32 and x.device.type == "cpu")
    return exact and U.dtype == x.dtype and x.numel() // n * (m + n) > m * n


class FusedLinear(torch.autograd.Function):
    """The forms of :func:`fused_linear`; the last argument chooses."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        U: Tensor,
        S: Tensor,
        V: Tensor,
        K: Tensor,
        L: Tensor,
        alpha: float,
        merged: bool,
    ) -> Tensor:
        """y, as :func:`fused_linear` has it."""
        ctx.save_for_backward(x, weight, U, S, V, K, L)
        ctx.alpha, ctx.merged = alpha, merged
        A, B = (factor.to(x.dtype) for factor in factored(U, S, V, K, L))
        if merged:
            return F.linear(x, torch.addmm(weight, A, B.mT, alpha=alpha), bias)
        rows = x.reshape(-1, x.shape[-1])
        y = F.linear(rows, weight, bias).addmm_(rows @ B, A.mT, alpha=alpha)
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, bias, K and L."""
        (dy,) = grad_outputs
        x, weight, U, S, V, K, L = ctx.saved_tensors
        rank = U.shape[1]
        needs_x, _, needs_bias, *_, needs_K, needs_L, _, _ = ctx.needs_input_grad
        dx = of_bias = of_K = of_L = None
        with exact_products(x.device):  # a backward pass may be run inside autocast
            A, B = (factor.to(x.dtype) for factor in factored(U, S, V, K, L))
            rows, dy = _in_parts(x), _in_parts(dy)
            coordinates = _thin(A[:, rank if ctx.merged else 0 :], dy)  # the last of them are U^T dy^T
            if needs_x and ctx.merged:
                dx = dy @ torch.addmm(weight, A, B.mT, alpha=ctx.alpha)
            elif needs_x:
                dx = torch.baddbmm(dy @ weight, coordinates.mT, B.mT.expand(len(dy), -1, -1), alpha=ctx.alpha)
            if needs_K:
                of_K = ctx.alpha * (_thin(B[:, :rank], rows) @ dy).sum(0).mT.to(K.dtype)
            if needs_L:
                of_L = project_out(ctx.alpha * (coordinates[:, -rank:] @ rows).sum(0).mT.to(L.dtype), V)
            if needs_bias:
                of_bias = dy.sum((0, 1))
        dx = dx if dx is None else dx.view(x.shape)
        return dx, None, of_bias, None, None, None, of_K, of_L, None, None


def _in_parts(x: Tensor) -> Tensor:
    """Rows (T, n) as (parts, T / parts, n): BLAS shares out a batch to all cores, but not a product that is thin."""
    count = x.shape[:-1].numel()
    parts = math.gcd(count, 8)
    return x.reshape(parts, count // parts, x.shape[-1])


def _thin(basis: Tensor, x: Tensor) -> Tensor:
    """Coordinates (parts, w, rows) of the rows of x (parts, rows, n) in a basis (n, w)."""
    return torch.bmm(basis.mT.expand(len(x), -1, -1), x.mT)
