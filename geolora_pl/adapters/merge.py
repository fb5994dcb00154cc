"""Merge adapters into the weights, for good or for a while; unmerging restores every bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from geolora_pl.adapters.base import GeoLoRALayer
from geolora_pl.adapters.inject import find_adapters
from geolora_pl.adapters.savers import let_save_pretrained
from geolora_pl.adapters.statistics import running_statistics
from geolora_pl.adapters.targets import replace_layers
from geolora_pl.adapters.wrappers import unwrapped
from geolora_pl.math.precision import exact_products

# Part of the update's own output by which merging may change an output: 8-bit activations of quantised layers take less
# than half of it, while a layer that is more than its weight is off by a multiple of the update.
_CHANGED = 0.02


class MergedAdapters:
    r"""Adapters that :func:`merge_adapters` has merged into their base, and that can be put back.

    .. math:: W = \mathrm{round}(W_0 + \Delta), \qquad \mathrm{difference} = \max |f_W(X) - f_{W_0, \Delta}(X)|

    The base weights are kept beside the merged ones, so that :meth:`unmerge` brings adapters and base back to the bit
    in every precision; it takes the memory of both. As a context manager it unmerges at the end.

    Attributes:
        changes: The Frobenius norm of each layer's change relative to its base weight, by name.
        differences: The largest difference of an output of the merged layer to that of the adapted one, by name, for
            eight random inputs X of the standard normal distribution (of an embedding for its first eight rows), in the
            precision of the layer: the rounding.

    Args:
        model: A model with adapters; plain until it is unmerged.

    Raises:
        ValueError: As :func:`merge_adapters` (nothing is merged then).

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
        with unwrapped(model) as plain:
            self._layers = {
                name: layer
                for name, layer in plain.named_modules(remove_duplicate=False)
                if isinstance(layer, GeoLoRALayer)
            }
        self._weights = [(layer, getattr(layer.base, "weight", None)) for layer in find_adapters(model).values()]
        self.changes, self.differences = _merge(model)

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
        with unwrapped(self._model) as plain:
            for name, layer in self._layers.items():
                layer.train(plain.get_submodule(name).training)  # the mode may have changed in the meantime
                plain.set_submodule(name, layer)
        self._layers, self._weights = {}, []

    def __enter__(self) -> MergedAdapters:
        return self

    def __exit__(self, *_: object) -> None:
        if self._layers:
            self.unmerge()


@torch.no_grad()
def merge_adapters(model: nn.Module) -> dict[str, float]:
    """Fold every adapter into its base weight, in place, and put the plain layers back.

    The sum is formed in the precision of the factors and rounded once to that of the base. Pending increments are
    part of it. Before the first layer is replaced, the outputs of every merged layer are compared with those of the
    adapted one: they differ where the layer is more than ``W x + b``, as with a hook or with a forward of its own.
    A quantised layer becomes a plain one of more bits.
    The merged weight is a new tensor, so a weight that was tied to one outside the adapters stays as it was there.

    Args:
        model: A model with adapters; plain again afterwards.

    Returns:
        The Frobenius norm of each layer's change relative to its base weight, by name.

    Raises:
        ValueError: The model has no adapters, a trained value is not finite, or a merged layer would not compute what
            the adapted layer does (nothing is merged then).

    Example:
        >>> from geolora_pl import inject_adapters
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = inject_adapters(model)
        >>> merge_adapters(model)
        {'0': 0.0}
    """
    changes, _ = _merge(model)
    let_save_pretrained(model)
    return changes


def _merge(model: nn.Module) -> tuple[dict[str, float], dict[str, float]]:
    """Merge, and return what has changed and the differences of the outputs, by name."""
    adapters = find_adapters(model)
    if not adapters or isinstance(model, GeoLoRALayer):
        raise ValueError("the model holds no adapters: there is nothing to merge in it")
    _refuse_what_is_not_finite(model)
    merged, changes, differences = {}, {}, {}
    for name, layer in adapters.items():
        merged[name], changes[name], differences[name] = _merged(name, layer)
    with unwrapped(model) as plain:
        replace_layers(plain, ((layer, layer.plain(merged[name])) for name, layer in adapters.items()))
    return changes, differences


def _refuse_what_is_not_finite(model: nn.Module) -> None:
    """Raise a ValueError for a trained parameter or a running statistic that is not finite."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, tensor in {**trained, **running_statistics(model)}.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite, so nothing is merged: go back to a checkpoint before it broke")


def _merged(name: str, layer: GeoLoRALayer) -> tuple[Tensor, float, float]:
    """The merged weight of a layer, its relative change, and the largest difference of an output."""
    if (reason := layer.refusal(layer.base)) is not None:  # the layer was changed after it got its adapter
        raise ValueError(f"{name} {reason}")
    with exact_products(layer.U.device):
        base, delta = layer.base_weight(), layer.delta_weight()
        weight = layer.updated(base, delta)
        if not weight.isfinite().all():
            raise ValueError(
                f"the merged weight of {name} is not finite in {weight.dtype}: go back to a checkpoint before "
                "the update broke, or cast the model to a wider type"
            )
        of_base = torch.linalg.vector_norm(base, dtype=layer.U.dtype)
        change = float(torch.linalg.vector_norm(delta) / of_base.clamp_min(1e-30))
        if change:
            _refuse_what_is_more_than_its_weight(name, layer, 1 / change if of_base else 1.0)
        adapted, plain, _ = _outputs(name, layer, weight)
        return weight, change, float((plain - adapted).abs().max())


def _refuse_what_is_more_than_its_weight(name: str, layer: GeoLoRALayer, times: float) -> None:
    """Raise a ValueError if merging changes the outputs, with the update so many times as large, as large as the base.

    A small update would be lost in the rounding of the outputs, and with it whether it arrives where it should.
    """
    scaling = layer.scaling
    try:
        layer.scaling = scaling * times
        weight = layer.weight
        adapted, plain, base = (y.to(layer.U.dtype) for y in _outputs(name, layer, weight))
    finally:
        layer.scaling = scaling
    update, off = torch.linalg.vector_norm(adapted - base), torch.linalg.vector_norm(plain - adapted)
    rounding = torch.finfo(weight.dtype).eps * torch.linalg.vector_norm(adapted)
    if not off <= _CHANGED * update + rounding:
        raise ValueError(
            f"{name} computes more than W x + b ({type(layer.base).__name__}: a forward of its own, or a hook), and "
            f"merged it would differ by {float(off / update):.0%} of its update: nothing is merged; save the adapters "
            "beside the base instead (save_adapter, export_peft)"
        )


def _outputs(name: str, layer: GeoLoRALayer, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of the adapted layer, of the plain layer with this weight and of the base, which change nothing."""
    own, modes = getattr(layer.base, "weight", None), [(module, module.training) for module in layer.modules()]
    try:
        layer.eval()
        x = layer.sample_inputs(weight.dtype)
        adapted, base = layer(x), layer.base(x)
        return adapted, layer.plain(weight)(x), base
    except (RuntimeError, TypeError, IndexError) as error:
        raise ValueError(
            f"{name} cannot be compared before and after the merge, so nothing is merged ({error}): sample_inputs of "
            f"{type(layer).__name__} must return inputs that the layer takes"
        ) from error
    finally:
        if own is not None:  # a quantised layer may keep its weight under other names, which have not changed
            layer.base.weight = own
        for module, mode in modes:
            module.training = mode
