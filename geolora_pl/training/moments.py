"""Carry an optimizer's moments along when the bases of the adapters move."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from geolora_pl.adapters.base import GeoLoRALayer
from geolora_pl.math.transport import transport_first_moment, transport_second_moment
from geolora_pl.training.internals import foreach_copy_

_FIRST = ("exp_avg", "momentum_buffer")
_SECOND = ("exp_avg_sq", "max_exp_avg_sq")

Bases = tuple[Tensor, Tensor]


def transport_moments(
    optimizer: Optimizer, layers: Sequence[GeoLoRALayer], old: Bases, new: Bases, moves: Tensor
) -> set[str]:
    """Rewrite the state that an optimizer keeps for K and L in the coordinates of the new bases, in place.

    First moments (``exp_avg``, ``momentum_buffer``) are one tangent vector and are projected as such; elementwise
    second moments (``exp_avg_sq``, ``max_exp_avg_sq``) take the squares of the rotations; a scalar, or one number per
    row, does not depend on the basis and stays; any other state is set to zero.

    Args:
        optimizer: Any torch optimizer.
        layers: B adapters of one shape.
        old: The leading columns of U (B, m, p + c) and V (B, n, p + c) before the retraction; the others are and stay
            zero.
        new: The same columns after the retraction.
        moves: (B,), bool; the state of the other adapters stays to the bit.

    Returns:
        The keys of the state that is set to zero where an adapter moves.
    """
    (U, V), (U_new, V_new) = old, new
    states = [(optimizer.state.get(layer.K, {}), optimizer.state.get(layer.L, {})) for layer in layers]
    reset = set()
    for key in sorted({key for pair in states for state in pair for key in state}):
        if key not in (*_FIRST, *_SECOND):
            for pair, moves_here in zip(states, moves.unbind(), strict=True):
                for state in pair:
                    if _depends_on_basis(state.get(key)):
                        state[key].masked_fill_(moves_here, 0)
                        reset.add(key)
            continue
        having = [i for i, pair in enumerate(states) if all(_depends_on_basis(state.get(key)) for state in pair)]
        if not having:
            continue
        of_K, of_L = ([states[i][side][key][:, : U.shape[-1]] for i in having] for side in (0, 1))
        m_K, m_L = torch.stack(of_K), torch.stack(of_L)
        here, U_here, V_here, U_new_here, V_new_here = (
            batch if len(having) == len(layers) else torch.stack([batch[i] for i in having])
            for batch in (moves[:, None, None], U, V, U_new, V_new)
        )
        if key in _FIRST:
            new_K, new_L = transport_first_moment(m_K, m_L, U_here, V_here, U_new_here, V_new_here, layers[0].probes)
        else:
            new_K = transport_second_moment(m_K, V_here, V_new_here)
            new_L = transport_second_moment(m_L, U_here, U_new_here)
        for after, before in ((new_K, m_K), (new_L, m_L)):
            torch.where(here, after, before, out=after)
        foreach_copy_(of_K + of_L, [*new_K.unbind(), *new_L.unbind()])
    return reset


def _depends_on_basis(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() > 1
