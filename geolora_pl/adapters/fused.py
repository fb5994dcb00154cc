"""A linear layer with its update as one function: fewer and better shaped products than the sum of its parts."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from geolora_pl.adapters.internals import is_transformed, reshaped
from geolora_pl.math.decomposition import factored, project_out
from geolora_pl.math.precision import without_autocast


class _TangentGradient(torch.autograd.Function):
    """The gradients of K and L as the backward of a function: probes included, and none of L in the span of V.

    The gradients of K and L both contain ``U U^T G V V^T``. Without this projection a step would take that part
    twice, and would differ from Algorithm 1 by exactly that part. The projection acts before gradients are clipped,
    reduced and averaged. What probes hold takes no part in the forward: their columns are zero in what this returns,
    but they have the gradients that they would have if they did.
    """

    @staticmethod
    def forward(ctx: Any, K: Tensor, L: Tensor, V: Tensor, probes: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(V[:, probes:])
        if not probes:
            return K.view_as(K), L.view_as(L)
        K, L = K.clone(), L.clone()
        K[:, :probes], L[:, :probes] = 0, 0
        return K, L

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        of_K, of_L = grad_outputs
        (V,) = ctx.saved_tensors
        with without_autocast(V.device):  # a backward pass may be run inside autocast
            return of_K, project_out(of_L, V), None, None


def tangent_factored(U: Tensor, S: Tensor, V: Tensor, K: Tensor, L: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of :func:`~geolora_pl.math.decomposition.factored`, with gradients also for the probes.

    The gradient of L gets no part in the span of V, without probes.
    """
    probes = U.shape[1] - S.shape[1]
    if is_transformed():
        K, L = _with_tangent_gradient(K, L, V, probes)
    else:
        K, L = _TangentGradient.apply(K, L, V, probes)  # type: ignore[no-untyped-call]
    point = torch.addmm(K[:, probes:], U[:, probes:], S)
    return torch.cat([K[:, :probes], point, U], dim=1), torch.cat([V, L], dim=1)


def _with_tangent_gradient(K: Tensor, L: Tensor, V: Tensor, probes: int) -> tuple[Tensor, Tensor]:
    """The same as :class:`_TangentGradient`, of differences that are zero but have a gradient.

    Every transform and mode of differentiation takes it, but an autocast around the backward pass would round it.
    """
    live = V[:, probes:]
    in_span = live @ (live.mT @ L)
    L = L + (in_span.detach() - in_span)
    K, L = (torch.cat([x[:, :probes] - x[:, :probes].detach(), x[:, probes:]], dim=1) for x in (K, L))
    return K, L


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None, factors: tuple[Tensor, ...], alpha: float) -> Tensor:
    r"""A frozen linear layer plus its update in tangent coordinates.

    .. math:: y = W_0 x + b + \alpha \left( (U S + K) V^T + U L^T \right) x

    The gradients are those of :func:`tangent_factored`, to rounding: U and S have none, that of L has no part in the
    span of V, and probes have theirs. The only activation that is kept for them is ``x``. K and L cost four thin
    products, two of which LoRA has as well; the rest of the update takes one of two forms, which
    :func:`pays_to_merge` chooses:

    * *merged*: one weight ``W_0 + alpha A B^T`` in the forward and one in the backward, or
    * *beside*: the thin products ``(x B) A^T`` and ``(dy A) B^T``, added to the base's own results.

    The thin products of the backward are (rank, ...) matrices: BLAS forms them several times faster than (..., rank).

    Args:
        x: (..., n).
        weight: (m, n), frozen, of the dtype of ``x``; contiguous, or the transpose of a contiguous matrix.
        bias: (m,), of the dtype of ``x``.
        factors: U (m, w), S (w - p, w - p), V (n, w), K (m, w) and L (n, w), of any floating dtype, with p probes.
        alpha: Scale of the update.

    Returns:
        (..., m).
    """
    rows = x.reshape(-1, x.shape[-1])
    merged = pays_to_merge(rows, weight, factors[0])
    # Autograd forbids changing in place a view that a custom function returns, so the output gets its shape here. Like
    # matmul it makes no view: an `y += x` behind a view would drop the hook by which FSDP2 gathers parameters.
    y = FusedLinear.apply(rows, weight, bias, *factors, alpha, merged)  # type: ignore[no-untyped-call]
    return reshaped(y, (*x.shape[:-1], len(weight)))


def pays_to_merge(rows: Tensor, weight: Tensor, U: Tensor) -> bool:
    r"""Whether one merged weight per pass is cheaper than the update beside the base, and as exact.

    For T rows the update takes ``4 w m n`` operations per pass if it is merged and ``4 w T (m + n)`` if it is not. In
    the backward pass a quarter of the latter, ``dy U``, is needed in both forms; ``benchmarks/speed/products.py``
    measures both. In low precision the sum would round the small update away, and a GPU may form float32 products in
    TF32.
    """
    m, n = weight.shape
    exact = rows.dtype == torch.float64 or (rows.dtype == torch.float32 and rows.device.type == "cpu")
    return exact and U.dtype == rows.dtype and len(rows) * (m + n) > m * n


class FusedLinear(torch.autograd.Function):
    """Both forms of :func:`fused_linear` for rows (T, n); the last argument chooses one."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
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
        """Return the output (T, m)."""
        A, B = (factor.to(rows.dtype) for factor in factored(U, S, V, K, L))
        ctx.save_for_backward(rows, weight, U, S, V, K, L, A, B)
        ctx.alpha, ctx.merged = alpha, merged
        if merged:
            return F.linear(rows, _merge(weight, A, B, alpha), bias)
        return F.linear(rows, weight, bias).addmm_(rows @ B, A.mT, alpha=alpha)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the rows, of bias, K and L."""
        (dy,) = grad_outputs
        rows, weight, U, S, V, K, L, A, B = ctx.saved_tensors
        w, alpha, merged = U.shape[1], ctx.alpha, ctx.merged
        needs_rows, _, needs_bias, *_, needs_K, needs_L, _, _ = ctx.needs_input_grad
        of_rows = of_bias = of_K = of_L = None
        with without_autocast(rows.device):  # a backward pass may be run inside autocast
            if torch.is_grad_enabled():  # for gradients that are differentiable; that of L has no part in V again
                A, B = (factor.to(rows.dtype) for factor in tangent_factored(U, S, V, K, L))
            beside = needs_rows and not merged
            U_, V_ = (U, V) if merged else (A[:, w:], B[:, :w])  # in the dtype of the rows
            x_parts, dy_parts = _in_parts(rows), _in_parts(dy)
            # Thin products come first, while dy is still in the cache, where the layer after this one has left it.
            if beside or needs_L:
                coordinates = _thin(A if beside else U_, dy_parts)  # the last w of them are U^T dy^T
            if needs_L:
                of_L = _sum_of_parts(coordinates[..., -w:, :] @ x_parts, alpha, L)
                of_L = project_out(of_L, V[:, w - S.shape[1] :])
            if needs_K:
                of_K = _sum_of_parts(_thin(V_, x_parts) @ dy_parts, alpha, K)
            if needs_rows and merged:
                of_rows = dy @ _merge(weight, A, B, alpha)
            elif needs_rows:
                of_rows = (dy @ weight).addmm_(coordinates.mT.reshape(len(dy), 2 * w), B.mT, alpha=alpha)
            if needs_bias:
                of_bias = dy.sum(0)
        return of_rows, None, of_bias, None, None, None, of_K, of_L, None, None


def _merge(weight: Tensor, A: Tensor, B: Tensor, alpha: float) -> Tensor:
    """``weight + alpha A B^T`` in the layout of the weight: a copy into the other layout would double the cost."""
    if weight.is_contiguous():
        return torch.addmm(weight, A, B.mT, alpha=alpha)
    return torch.addmm(weight.mT, B, A.mT, alpha=alpha).mT


def _in_parts(rows: Tensor) -> Tensor:
    """Rows (T, n), or (parts, T / parts, n) for several cores: BLAS distributes a batch, but not one thin product."""
    if torch.compiler.is_compiling() or rows.device.type != "cpu" or torch.get_num_threads() == 1:
        return rows  # when compiled, T may be a symbol, which has no divisors
    parts = math.gcd(len(rows), 8)
    return rows.reshape(parts, len(rows) // parts, rows.shape[-1])


def _thin(basis: Tensor, x: Tensor) -> Tensor:
    """Coordinates (..., w, rows) of the rows of x (..., rows, n) in a basis (n, w)."""
    return basis.mT @ x.mT if x.dim() == 2 else torch.bmm(basis.mT.expand(len(x), -1, -1), x.mT)


def _sum_of_parts(products: Tensor, alpha: float, like: Tensor) -> Tensor:
    """The gradient (n, w), in the dtype of K or L, as the sum of its parts (..., w, n)."""
    gradient = (products if products.dim() == 2 else products.sum(0)).to(like.dtype).mT
    return gradient if alpha == 1 else alpha * gradient  # the default saves a call
