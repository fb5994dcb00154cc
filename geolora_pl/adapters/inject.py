"""Find the layers to adapt, put the adapters in, walk them, and merge them back into plain layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from geolora_pl.adapters.base import GeoLoRALayer
from geolora_pl.adapters.config import AdapterConfig
from geolora_pl.adapters.kinds import adapter_class_of
from geolora_pl.math.precision import exact_products

# Names that libraries give to the part of a model that is made anew for each task.
_HEAD_NAMES = frozenset({"head", "heads", "classifier", "pre_classifier", "score", "lm_head", "qa_outputs"})


def inject_adapters(model: nn.Module, config: AdapterConfig | None = None) -> dict[str, GeoLoRALayer]:
    """Put adapters on the chosen layers, in place, and freeze everything else but ``modules_to_save``.

    The output of the model does not change. A module that the model holds under several names is adapted once, and so
    is a weight that several layers share.

    Args:
        model: Any module; its layers are replaced inside their parents.
        config: What to adapt; by default every linear layer but the head.

    Returns:
        The adapters by the names of the layers they replaced.

    Raises:
        ValueError: The model already has adapters, nothing matches, a name in ``modules_to_save`` matches nothing, a
            layer belongs to ``nn.MultiheadAttention`` or cannot be adapted, layers share a weight but not their bias,
            or an embedding shares its table with another layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> adapters = inject_adapters(model, AdapterConfig(target_modules=["0"], modules_to_save=["2"]))
        >>> list(adapters), sum(p.numel() for p in model[2].parameters() if p.requires_grad)
        (['0'], 18)
    """
    config = config or AdapterConfig()
    if has_adapters(model):
        raise ValueError("the model already has adapters: merge_adapters(model) first, or inject into a fresh model")
    if adapter_class_of(model) is not None:
        raise ValueError("the model is itself one layer and cannot be replaced in place: wrap it in nn.Sequential")
    saved = _modules_to_save(model, config.modules_to_save)
    targets = _find_targets(model, config, saved)

    _check_rank_pattern(config, targets)

    model.requires_grad_(False)
    adapters: dict[str, GeoLoRALayer] = {}
    of_weight: dict[int, GeoLoRALayer] = {}
    for name, layer in targets.items():
        shared = of_weight.get(_identity(layer))
        if shared is None:
            kind = adapter_class_of(layer)
            assert kind is not None, "a target has an adapter"
            shared = adapters[name] = kind(layer, _config_for(name, config))
            of_weight[_identity(layer)] = shared
        assert shared.bias is _bias(layer), "tied weights with two biases are refused before anything is replaced"
        model.set_submodule(name, shared)
    for module in saved.values():
        module.requires_grad_(True)
    if config.train_bias == "all":
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # in_proj_bias, too
                parameter.requires_grad_(True)
    return adapters


def find_adapters(model: nn.Module) -> dict[str, GeoLoRALayer]:
    """The adapters of a model by name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GeoLoRALayer)}


def has_adapters(model: nn.Module) -> bool:
    """Whether a model holds an adapter."""
    return any(isinstance(module, GeoLoRALayer) for module in model.modules())


def adapter_parameters(adapters: Mapping[str, GeoLoRALayer]) -> int:
    """Active adapter parameters: the sum of ``rank * (in + out)``."""
    return sum(layer.rank * (layer.in_features + layer.out_features) for layer in adapters.values())


@torch.no_grad()
def merge_adapters(model: nn.Module) -> dict[str, float]:
    """Fold every adapter into its base weight, in place, and put the plain layers back.

    The sum is formed in the precision of the factors and rounded once to that of the base. Pending increments count.
    A quantised layer becomes a plain one of more bits.
    The merged weight is a new tensor, so a weight that was tied to one outside the adapters stays as it was there.

    Args:
        model: A model with adapters; plain again afterwards.

    Returns:
        The Frobenius norm of each layer's change relative to its base weight, by name.

    Raises:
        ValueError: The model has no adapters, or an update is not finite (nothing is merged then).

    Example:
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
    names = _all_names(model)
    for name, layer in adapters.items():
        plain = layer.plain(merged[name])
        for alias in names[id(layer)]:
            model.set_submodule(alias, plain)
    return changes


def remove_adapters(model: nn.Module) -> None:
    """Put the plain layers back without their updates, in place.

    What else was trained, such as a head, stays as it is.

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
    names = _all_names(model)
    for layer in adapters.values():
        for alias in names[id(layer)]:
            model.set_submodule(alias, layer.base)


def matches(name: str, patterns: str | Sequence[str]) -> bool:
    """Whether a module's name is meant: by one regular expression, or by a list of names and name endings."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _all_names(model: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return names


def _find_targets(model: nn.Module, config: AdapterConfig, saved: dict[str, nn.Module]) -> dict[str, nn.Module]:
    everything = config.target_modules == "all-linear"
    head = _head_modules(model) if everything else set()
    in_saved = {id(module) for root in saved.values() for module in root.modules()}
    attention = {
        id(module): parent
        for parent, attention in model.named_modules()
        if isinstance(attention, nn.MultiheadAttention)
        for module in attention.modules()
    }
    targets: dict[str, nn.Module] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        kind = adapter_class_of(layer)
        if not name or kind is None or matches(name, config.exclude_modules):
            continue
        if everything:
            if not kind.is_linear or id(layer) in head or id(layer) in in_saved:
                continue
        elif not matches(name, config.target_modules):
            continue
        if id(layer) in in_saved:
            raise ValueError(f"{name} is in target_modules and in modules_to_save={config.modules_to_save!r}: drop one")
        if id(layer) in attention:
            raise ValueError(
                f"{name} belongs to nn.MultiheadAttention ({attention[id(layer)]}), which reads the layer's weight and "
                f"never calls it, so an adapter there would be ignored: add {name.rpartition('.')[2]!r} to "
                "exclude_modules, or use attention that calls its linear layers"
            )
        if (reason := kind.refusal(layer)) is not None:
            raise ValueError(f"{name} {reason}")
        targets[name] = layer
    suited = [name for name, module in model.named_modules() if adapter_class_of(module) is not None]
    if not targets and config.target_modules == "auto":
        raise ValueError(
            "target_modules='auto' is for a GeoLoRAModule, which knows its own layers: name them, or 'all-linear'"
        )
    if not targets:
        raise ValueError(
            f"target_modules={config.target_modules!r} matches no layer that can be adapted (exclude_modules="
            f"{config.exclude_modules!r}); the model has {', '.join(suited) if suited else 'none at all'}"
        )
    _refuse_patterns_without_match("target_modules", config.target_modules, suited)
    _refuse_patterns_without_match("exclude_modules", config.exclude_modules, dict(model.named_modules()))
    _refuse_what_one_adapter_cannot_serve(model, targets)
    return targets


def _refuse_patterns_without_match(argument: str, patterns: str | Sequence[str], names: Iterable[str]) -> None:
    """An entry of a list that means nothing is a slip of the pen."""
    names = list(names)
    for pattern in [] if isinstance(patterns, str) else patterns:
        if not any(matches(name, [pattern]) for name in names):
            raise ValueError(
                f"{argument}={pattern!r} matches none of {', '.join(filter(None, names))}: drop or mend it"
            )


def _check_rank_pattern(config: AdapterConfig, targets: Iterable[str]) -> None:
    names = list(targets)
    for pattern in config.rank_pattern:
        if not any(_means(pattern, name) for name in names):
            raise ValueError(f"rank_pattern={pattern!r} matches none of the adapted layers {', '.join(names)}")


def _means(pattern: str, name: str) -> bool:
    """Whether a key of ``rank_pattern`` means a layer: as a name, or as a regular expression."""
    return matches(name, [pattern]) or matches(name, pattern)


def _refuse_what_one_adapter_cannot_serve(model: nn.Module, targets: dict[str, nn.Module]) -> None:
    first: dict[int, str] = {}
    for name, layer in targets.items():
        other = first.setdefault(_identity(layer), name)
        if _bias(targets[other]) is not _bias(layer):
            raise ValueError(
                f"{other} and {name} share a weight but not their bias, which one adapter cannot serve: add one of "
                "them to exclude_modules"
            )
    embeddings = {_identity(layer): name for name, layer in targets.items() if isinstance(layer, nn.Embedding)}
    for name, module in model.named_modules():
        tied = embeddings.get(id(getattr(module, "weight", None)))
        if tied is not None and not isinstance(module, nn.Embedding):
            raise ValueError(
                f"{tied} shares its table with {name}, which would go on without the update: leave it out of "
                f"target_modules, or untie it: {name}.weight = nn.Parameter({name}.weight.clone())"
            )


def _identity(layer: nn.Module) -> int:
    """What tied layers have in common: their weight; a quantised layer may have none of that name."""
    weight = getattr(layer, "weight", None)
    return id(layer if weight is None else weight)


def _bias(layer: nn.Module) -> object:
    return getattr(layer, "bias", None)


def _modules_to_save(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    saved: dict[str, nn.Module] = {}
    for pattern in patterns:
        found = {name: module for name, module in model.named_modules() if name and matches(name, [pattern])}
        if not found:
            children = ", ".join(name for name, _ in model.named_children())
            raise ValueError(f"modules_to_save={pattern!r} matches no module; the model's own are {children}")
        saved |= found
    return saved


def _head_modules(model: nn.Module) -> set[int]:
    """What timm and transformers call the classifier, and what goes by one of the usual names."""
    heads: list[object] = [
        module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in _HEAD_NAMES and not re.search(r"(^|\.)\d+\.", name)  # not inside a block
    ]
    for module in model.modules():
        for getter in ("get_classifier", "get_output_embeddings"):
            if callable(getattr(module, getter, None)):
                head = getattr(module, getter)()
                heads.extend(head if isinstance(head, (tuple, list)) else [head])
    return {id(module) for head in heads if isinstance(head, nn.Module) for module in head.modules()}


def _config_for(name: str, config: AdapterConfig) -> AdapterConfig:
    for pattern, rank in config.rank_pattern.items():
        if _means(pattern, name):
            return replace(config, init_rank=rank, max_rank=max(rank, config.max_rank))
    return config
