"""The registry: which class of adapter a class of layers gets."""

from __future__ import annotations

from torch import nn

from geolora_pl.adapters.base import GeoLoRALayer
from geolora_pl.adapters.kinds import GeoLoRAConv1D, GeoLoRAConv2d, GeoLoRAEmbedding, GeoLoRALinear

# The keys are classes, or the full names of classes whose library is not imported here.
_ADAPTERS: dict[type[nn.Module] | str, type[GeoLoRALayer]] = {
    nn.Linear: GeoLoRALinear,
    nn.Conv2d: GeoLoRAConv2d,
    nn.Embedding: GeoLoRAEmbedding,
    "transformers.pytorch_utils.Conv1D": GeoLoRAConv1D,
}


def register_adapter(layer_class: type[nn.Module], adapter_class: type[GeoLoRALayer]) -> None:
    """Say which adapter a class of layers gets; it also serves subclasses that have no entry of their own.

    Args:
        layer_class: The layers.
        adapter_class: Their adapter, a subclass of :class:`GeoLoRALayer`; for layers with ``in_features``,
            ``out_features`` and a forward ``W x + b`` it is :class:`GeoLoRALinear`.

    Raises:
        ValueError: An argument is not a class of that kind.

    Example:
        >>> import torch
        >>> class Projection(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.in_features, self.out_features = 8, 6
        ...         self.weight = nn.Parameter(torch.randn(6, 8))
        ...     def forward(self, x):
        ...         return x @ self.weight.T
        >>> register_adapter(Projection, GeoLoRALinear)
        >>> adapter_class_of(Projection()).__name__
        'GeoLoRALinear'
    """
    for argument, given, wanted in (
        ("layer_class", layer_class, nn.Module),
        ("adapter_class", adapter_class, GeoLoRALayer),
    ):
        if not (isinstance(given, type) and issubclass(given, wanted)):
            raise ValueError(f"{argument}={given!r} must be a subclass of {wanted.__name__}")
    _ADAPTERS[layer_class] = adapter_class


def adapter_class_of(layer: nn.Module) -> type[GeoLoRALayer] | None:
    """The class of adapter for a layer, found by the nearest of its base classes; ``None`` if it cannot be adapted."""
    for layer_class in type(layer).__mro__:
        for key in (layer_class, f"{layer_class.__module__}.{layer_class.__qualname__}"):
            if key in _ADAPTERS:
                return _ADAPTERS[key]
    return None
