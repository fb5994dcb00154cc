"""Merge adapters into the weights, for good or for a while; unmerging restores every bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from geolora_pl.adapters.base import GeoLoRALayer
from geolora_pl.adapters.inject import find_adapters
from geolora_pl.adapters.targets import all_names
from geolora_pl.math.precision import exact_products

_INPUTS = 8  # random inputs on which a layer is compared before and after


class MergedAdapters:
    r"""Adapters that :func:`merge_adapters` has merged into their base, and that can be put back.

    .. math:: W = \mathrm{round}(W_0 + \Delta), \qquad \mathrm{difference} = \max |(W - W_0 - \Delta) X|

    The base weights are kept beside the merged ones, so that :meth:`unmerge` brings adapters and base back to the bit
    in every precision; it takes the memory of both. As a context manager it unmerges at the end.

    Attributes:
        changes: The Frobenius norm of each layer's change relative to its base weight, by name.
        differences: The largest difference of an output to that before the merge, by name, for eight random inputs X
            of the standard normal distribution, in float32 (float64 in a float64 model): the rounding to the base's
            precision.

    Args:
        model: A model with adapters; plain until it is unmerged.

    Raises:
        ValueError: The model has no adapters, or an update or merged weight is not finite (nothing is merged then).

    Example:
        >>> from geolora_pl import inject_adapters
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = inject_adapters(model)
        >>> with MergedAdapters(model) as merged:
        ...     print(model[0], max(merged.differences.values()))
        Linear(in_features=8, out_features=8, bias=True) 0.0
        >>> list(find_adapters(model))
        ['0']
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers = {
            name: layer
            for name, layer in model.named_modules(remove_duplicate=False)
            if isinstance(layer, GeoLoRALayer)
        }
        adapters = find_adapters(model)
        bases = {name: layer.base_weight() for name, layer in adapters.items()}
        self._weights = [(layer, getattr(layer.base, "weight", None)) for layer in adapters.values()]
        self.changes = merge_adapters(model)
        self.differences = {
            name: _difference(layer, bases[name], _weight(model.get_submodule(name)))
            for name, layer in adapters.items()
        }

    def unmerge(self) -> None:
        """Put the adapters back, in place.

        Raises:
            ValueError: The adapters are back already.
        """
        if not self._layers:
            raise ValueError("the adapters are back already: merge them again first")
        for layer, weight in self._weights:
            if weight is not None:  # a quantised layer may keep its weight under other names, which have not changed
                layer.base.weight = weight
        for name, layer in self._layers.items():
            self._model.set_submodule(name, layer)
        self._layers, self._weights = {}, []

    def __enter__(self) -> MergedAdapters:
        return self

    def __exit__(self, *_: object) -> None:
        if self._layers:
            self.unmerge()


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight


def _difference(layer: GeoLoRALayer, base: Tensor, merged: Tensor) -> float:
    with exact_products(layer.U.device):
        delta = layer.delta_weight()
        m, n = delta.shape
        positions = layer.from_matrix(torch.arange(m * n, device=delta.device).view(m, n))  # the layout of the weight
        error = merged.to(delta.dtype) - (base.to(delta.dtype) + layer.from_matrix(delta))
        matrix = torch.empty_like(delta).flatten().scatter_(0, positions.flatten(), error.flatten()).view(m, n)
        generator = torch.Generator().manual_seed(0)  # leaves the user's random numbers alone
        inputs = torch.randn(n, _INPUTS, generator=generator, dtype=delta.dtype).to(delta.device)
        return float((matrix @ inputs).abs().max())


@torch.no_grad()
def merge_adapters(model: nn.Module) -> dict[str, float]:
    """Fold every adapter into its base weight, in place, and put the plain layers back.

    The sum is formed in the precision of the factors and rounded once to that of the base. Pending increments are
    part of it.
    A quantised layer becomes a plain one of more bits.
    The merged weight is a new tensor, so a weight that was tied to one outside the adapters stays as it was there.

    Args:
        model: A model with adapters; plain again afterwards.

    Returns:
        The Frobenius norm of each layer's change relative to its base weight, by name.

    Raises:
        ValueError: The model has no adapters, or an update is not finite (nothing is merged then).

    Example:
        >>> from geolora_pl import inject_adapters
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = inject_adapters(model)
        >>> merge_adapters(model)
        {'0': 0.0}
    """
    adapters = find_adapters(model)
    if not adapters or isinstance(model, GeoLoRALayer):
        raise ValueError("the model holds no adapters: there is nothing to merge in it")
    merged: dict[str, Tensor] = {}
    changes: dict[str, float] = {}
    for name, layer in adapters.items():
        with exact_products(layer.U.device):
            base, delta = layer.base_weight(), layer.delta_weight()
        merged[name] = layer.updated(base, delta)
        if not merged[name].isfinite().all():
            raise ValueError(
                f"the merged weight of {name} is not finite in {merged[name].dtype}: go back to a checkpoint before "
                "the update broke, or cast the model to a wider type"
            )
        norm = torch.linalg.vector_norm(base, dtype=layer.U.dtype)
        changes[name] = float(torch.linalg.vector_norm(delta) / norm.clamp_min(1e-30))
    names = all_names(model)
    for name, layer in adapters.items():
        plain = layer.plain(merged[name])
        for alias in names[id(layer)]:
            model.set_submodule(alias, plain)
    return changes
