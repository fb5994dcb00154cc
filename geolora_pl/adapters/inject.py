"""Put adapters into a model, walk them, and take them out again."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from geolora_pl.adapters.base import GeoLoRALayer
from geolora_pl.adapters.config import AdapterConfig
from geolora_pl.adapters.quantised import keep_trainable
from geolora_pl.adapters.registry import adapter_class_of
from geolora_pl.adapters.savers import let_save_pretrained, warn_at_save_pretrained
from geolora_pl.adapters.statistics import remember_buffers
from geolora_pl.adapters.targets import (
    bias_of,
    check_rank_pattern,
    config_of_each,
    find_modules_to_save,
    find_targets,
    replace_layers,
    weight_identity,
)
from geolora_pl.adapters.wrappers import unwrapped


def inject_adapters(model: nn.Module, config: AdapterConfig | None = None) -> dict[str, GeoLoRALayer]:
    """Put adapters on the chosen layers, in place, and freeze everything else but ``modules_to_save``.

    The output of the model does not change. A module that the model holds under several names is adapted once, and so
    is a weight that several layers share. Wrappers, such as that of ``torch.compile``, are no part of a name.

    Args:
        model: Any module; its layers are replaced inside their parents.
        config: What to adapt; by default every linear layer but the head.

    Returns:
        The adapters by the names of the layers they replaced.

    Raises:
        ValueError: The model already has adapters or is in ``DistributedDataParallel``, nothing matches, a name in
            ``modules_to_save`` matches nothing, a parameter has no shape yet, a layer belongs to
            ``nn.MultiheadAttention``, computes its weight (as with weight norm) or cannot be adapted for another
            reason, layers share a weight but not their bias, or an embedding shares its table with another layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> adapters = inject_adapters(model, AdapterConfig(target_modules=["0"], modules_to_save=["2"]))
        >>> list(adapters), sum(p.numel() for p in model[2].parameters() if p.requires_grad)
        (['0'], 18)
    """
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "the model is in DistributedDataParallel, which would not send the gradients of new adapters: inject first "
            "and wrap the model then"
        )
    with unwrapped(model) as plain:
        return _inject(plain, config or AdapterConfig())


def _inject(model: nn.Module, config: AdapterConfig) -> dict[str, GeoLoRALayer]:
    if has_adapters(model):
        raise ValueError("the model already has adapters: merge_adapters(model) first, or inject into a fresh model")
    if adapter_class_of(model) is not None:
        raise ValueError("the model is itself one layer and cannot be replaced in place: wrap it in nn.Sequential")
    if lazy := [name for name, parameter in model.named_parameters() if is_lazy(parameter)]:
        raise ValueError(f"{lazy[0]} of a lazy layer has no shape yet: call the model once with a batch first")
    saved = find_modules_to_save(model, config.modules_to_save)
    targets = find_targets(model, config, saved)

    check_rank_pattern(config, targets)

    model.requires_grad_(False)
    adapters: dict[str, GeoLoRALayer] = {}
    of_weight: dict[int, GeoLoRALayer] = {}
    config_of = config_of_each(config)
    for name, layer in targets.items():
        shared = of_weight.get(weight_identity(layer))
        if shared is None:
            kind = adapter_class_of(layer)
            assert kind is not None, "a target has an adapter"
            shared = adapters[name] = kind(layer, config_of(name))
            of_weight[weight_identity(layer)] = shared
        assert shared.bias is bias_of(layer), "tied weights with two biases are refused before anything is replaced"
        model.set_submodule(name, shared)
    remember_buffers(model)
    keep_trainable(model)
    warn_at_save_pretrained(model)
    for module in saved.values():
        module.requires_grad_(True)
    if config.train_bias == "all":
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # this includes in_proj_bias
                parameter.requires_grad_(True)
    return adapters


def find_adapters(model: nn.Module) -> dict[str, GeoLoRALayer]:
    """The adapters of a model by the names that they have without wrappers, each once."""
    with unwrapped(model) as plain:
        return {name: module for name, module in plain.named_modules() if isinstance(module, GeoLoRALayer)}


def has_adapters(model: nn.Module) -> bool:
    """Whether a model holds an adapter."""
    return any(isinstance(module, GeoLoRALayer) for module in model.modules())


def adapter_parameters(adapters: Mapping[str, GeoLoRALayer]) -> int:
    """Active adapter parameters: the sum of ``rank * (in + out)``."""
    return sum(layer.rank * (layer.in_features + layer.out_features) for layer in adapters.values())


def remove_adapters(model: nn.Module) -> None:
    """Put the plain layers back without their updates, in place.

    Other modules that were trained, such as a head, stay as they are.

    Args:
        model: A model with adapters; plain again afterwards.

    Raises:
        ValueError: The model has no adapters.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = inject_adapters(model)
        >>> remove_adapters(model)
        >>> model[0]
        Linear(in_features=8, out_features=8, bias=True)
    """
    adapters = find_adapters(model)
    if not adapters or isinstance(model, GeoLoRALayer):
        raise ValueError("the model holds no adapters: there is nothing to remove from it")
    with unwrapped(model) as plain:
        replace_layers(plain, ((layer, layer.base) for layer in adapters.values()))
    let_save_pretrained(model)
