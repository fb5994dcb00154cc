"""Which adapters an optimizer trains, worked out in one place for all who ask."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.optim import Optimizer

from geolora_pl.adapters.base import GeoLoRALayer

_REFUSED = (torch.optim.LBFGS, torch.optim.Rprop)


class Binding:
    """Knows for every optimizer which of the adapters it trains.

    Optimizer and adapters are asked every time: ``add_param_group`` changes the one, and loading a state with
    ``assign=True`` replaces the parameters of the other.

    Args:
        adapters: By name.
    """

    def __init__(self, adapters: Mapping[str, GeoLoRALayer]) -> None:
        self._adapters = adapters

    def trains_any(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer holds K or L of any adapter."""
        held = _held_by(optimizer)
        return any(id(factor) in held for layer in self._adapters.values() for factor in (layer.K, layer.L))

    def innermost(self, optimizer: Optimizer) -> Optimizer:
        """The optimizer that moves the adapters: the one inside of a wrapper, such as SAM or Lookahead.

        It takes the steps that count and keeps the state that moves with the bases.
        """
        seen = [optimizer]  # an inner optimizer may know its wrapper
        while inner := [o for o in _inside(seen[-1]) if o not in seen and self.trains_any(o)]:
            seen.append(inner[0])
        return seen[-1]

    def check(self, optimizer: Optimizer) -> None:
        """Raise a ValueError unless the optimizer suits and holds K and L of every adapter that is trained."""
        outer, optimizer = optimizer, self.innermost(optimizer)
        if isinstance(optimizer, _REFUSED):
            raise ValueError(
                f"{type(optimizer).__name__} keeps a history that cannot move with the bases of the adapters: use an "
                "optimizer of the Adam family, or SGD"
            )
        held = _held_by(optimizer)
        for name, layer in self._adapters.items():
            K, L = layer.K, layer.L
            if any(factor.requires_grad and id(factor) in held for factor in (layer.U, layer.S, layer.V)):
                raise ValueError(
                    f"the optimizer trains U, S or V of the adapter {name}, which would not stay orthonormal, and only "
                    "retractions move: let nothing but K and L of an adapter require gradients, also where you "
                    "unfreeze a model or its parts"
                )
            if K.requires_grad != L.requires_grad:
                raise ValueError(f"one of K and L of the adapter {name} is frozen: freeze both or neither")
            if K.requires_grad and not (id(K) in held and id(L) in held):
                if optimizer is not outer and id(K) in _held_by(outer):
                    raise ValueError(
                        f"{type(outer).__name__} gives only some of the adapters to the {type(optimizer).__name__} "
                        f"inside of it, and not {name}, so nobody knows all of their state: use that without a wrapper"
                    )
                raise ValueError(
                    f"the optimizer does not hold the factors of the adapter {name}: make it after "
                    "inject_adapters(model), from all parameters that require gradients"
                )


def _inside(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers that an optimizer has as attributes, one by one or in a list."""
    found = [value if isinstance(value, (list, tuple)) else [value] for value in vars(optimizer).values()]
    return [value for values in found for value in values if isinstance(value, Optimizer) and value is not optimizer]


def _held_by(optimizer: Optimizer) -> frozenset[int]:
    """The identities of the optimizer's parameters, gathered at every call, because groups may change at any time."""
    return frozenset(id(parameter) for group in optimizer.param_groups for parameter in group["params"])
