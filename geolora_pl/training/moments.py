"""Carry an optimizer's moments along when the bases of the adapters move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from geolora_pl.adapters.base import GeoLoRALayer
from geolora_pl.math.transport import transport_first_moment, transport_second_moment

_FIRST = {"exp_avg", "momentum_buffer", "grad_avg"}
# Squares, variances and bounds by which steps are divided, of the optimizers of torch, timm and transformers.
_SECOND = {
    "exp_avg_sq",
    "max_exp_avg_sq",
    "square_avg",
    "sum",
    "acc_delta",
    "exp_inf",
    "exp_avg_var",
    "max_exp_avg_var",
    "exp_hessian_diag_sq",
    "col_var",
    "exp_avg_sq_row",
    "exp_avg_sq_col",
    "exp_avg_sq_r",
    "exp_avg_sq_c",
}

Bases = tuple[Tensor, Tensor]
Moved = list[tuple[list[Tensor], list[Tensor]]]  # parts of an optimizer's state, and what they become


def transport_moments(
    optimizer: Optimizer, layers: Sequence[GeoLoRALayer], old: Bases, new: Bases, moves: Tensor
) -> tuple[Moved, set[str]]:
    """Work out the state that an optimizer keeps for K and L in the coordinates of the new bases; nothing changes yet.

    First moments (``exp_avg``, ``momentum_buffer``, ``grad_avg``) are one tangent vector and are projected as such.
    What steps are divided by (second moments, variances, bounds) takes the squares of the rotations: every new column
    is a weighted mean of the old ones, so that a denominator never falls to zero while the steps go on. A scalar, or
    one number per row, does not depend on the basis and stays. Of the state with other names what is nowhere negative
    is taken for a denominator, and the rest is set to zero. Where the means of gradients are kept beside the means of
    their squares, as by centered RMSprop, the squares move as means and variances: the difference of the two, whose
    root steps are divided by, would otherwise become negative.

    Args:
        optimizer: Any torch optimizer, without a wrapper.
        layers: B adapters of one shape.
        old: The leading columns of U (B, m, p + c) and V (B, n, p + c) before the retraction; the others are and stay
            zero.
        new: The same columns after the retraction.
        moves: (B,), bool; the state of the other adapters stays to the bit.

    Returns:
        What is to be copied where, and the keys of the state with other names.

    Raises:
        ValueError: The optimizer keeps state that cannot move: in fewer bits than a number, or as a matrix per side.
    """
    states = [(optimizer.state.get(layer.K, {}), optimizer.state.get(layer.L, {})) for layer in layers]
    width, unknown = old[0].shape[-1], set()
    moved: Moved = []
    means: dict[int, tuple[Tensor, ...]] = {}  # of gradients, by layer: of K and L, before and after
    for key in sorted({key for pair in states for state in pair for key in state}):  # grad_avg before square_avg
        having = [i for i, pair in enumerate(states) if _depends_on_basis(optimizer, key, pair, layers[i])]
        if not having:
            continue
        if key not in _FIRST | _SECOND:
            unknown.add(key)
        of_K, of_L = ([_as_matrix(states[i][side][key])[:, :width] for i in having] for side in (0, 1))
        m_K, m_L = (torch.stack(matrices).to(old[0].dtype) for matrices in (of_K, of_L))
        here, U, V, U_new, V_new = (
            batch if len(having) == len(layers) else torch.stack([batch[i] for i in having])
            for batch in (moves[:, None, None], *old, *new)
        )
        if key in _FIRST:
            new_K, new_L = transport_first_moment(m_K, m_L, U, V, U_new, V_new, layers[0].probes)
            if key == "grad_avg":
                means = dict(zip(having, zip(m_K, m_L, new_K, new_L, strict=True), strict=True))
        elif key == "square_avg" and means:
            none = tuple(torch.zeros_like(m[0]) for m in (m_K, m_L, m_K, m_L))
            squares = [torch.stack(parts).square() for parts in zip(*(means.get(i, none) for i in having), strict=True)]
            of_spread = (m_K - squares[0]).clamp_min(0), (m_L - squares[1]).clamp_min(0)
            new_K = transport_second_moment(of_spread[0], V, V_new) + squares[2]
            new_L = transport_second_moment(of_spread[1], U, U_new) + squares[3]
        else:
            new_K, new_L = transport_second_moment(m_K, V, V_new), transport_second_moment(m_L, U, U_new)
        if key in unknown:
            new_K, new_L = (new * _nowhere_negative(m) for new, m in ((new_K, m_K), (new_L, m_L)))
        after = [torch.where(here, new, m) for new, m in ((new_K, m_K), (new_L, m_L))]
        moved.append((of_K + of_L, [*after[0].unbind(), *after[1].unbind()]))
    return moved, unknown


def _depends_on_basis(optimizer: Optimizer, key: str, states: tuple[Any, Any], layer: GeoLoRALayer) -> bool:
    """Whether K and L have numbers per column under a key; raises a ValueError for what cannot be moved."""
    if _is_one_per_column([state.get(key) for state in states], layer):
        return True
    found = False
    for state, factor in zip(states, (layer.K, layer.L), strict=True):
        value = state.get(key)
        parts = value if isinstance(value, (list, tuple)) else [value]
        if not any(isinstance(part, Tensor) and part.dim() > 1 for part in parts):
            return False
        rows, columns = factor.shape
        plain = type(value) is type(factor.detach()) and value.is_floating_point()
        shape = tuple(value.shape) if plain else ()
        if shape == (rows, 1) and columns > 1:
            return False
        if shape not in ((rows, columns), (1, columns)):
            what = f"{shape} numbers" if shape else f"a {type(value).__name__} of other values than plain numbers"
            raise ValueError(
                f"{type(optimizer).__name__} keeps {key} for K and L as {what}, which cannot move with the bases of "
                "the adapters: use an optimizer that keeps full-precision numbers per entry, such as AdamW"
            )
        found = True
    return found


def _is_one_per_column(values: Sequence[Any], layer: GeoLoRALayer) -> bool:
    """Whether K and L have one number for each column, as in Adafactor; where both are square, it is one per row."""
    columns = layer.K.shape[1]
    return {layer.out_features, layer.in_features} != {columns} and all(
        isinstance(value, Tensor) and value.is_floating_point() and value.shape == (columns,) for value in values
    )


def _as_matrix(values: Tensor) -> Tensor:
    """What is kept for K or L as a matrix; one number per column is a row."""
    return values if values.dim() == 2 else values[None]


def _nowhere_negative(values: Tensor) -> Tensor:
    """Whether each matrix (B, rows, columns) has no entry below zero."""
    return (values >= 0).all(-1, keepdim=True).all(-2, keepdim=True)
