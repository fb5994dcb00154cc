"""Which layers of a model get an adapter, and which modules are trained in full."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NoReturn

from torch import nn

from geolora_pl.adapters.base import computed_tensor
from geolora_pl.adapters.config import AdapterConfig
from geolora_pl.adapters.names import ancestors, first_meant, matcher, means_nothing, meant_by
from geolora_pl.adapters.registry import adapter_class_of
from geolora_pl.errors import GeoLoRAWarning

# Names that libraries give to the part of a model that is new for each task.
_HEAD_NAMES = frozenset({"head", "heads", "classifier", "pre_classifier", "score", "lm_head", "qa_outputs"})


def replace_layers(model: nn.Module, replacements: Iterable[tuple[nn.Module, nn.Module]]) -> None:
    """Put other layers in the place of some, under every name that those have.

    Args:
        model: The model, which is changed in place.
        replacements: Pairs of a layer of the model and what comes in its place, which may be made on the way.
    """
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    for layer, other in replacements:
        for name in names[id(layer)]:
            model.set_submodule(name, other)


def find_targets(model: nn.Module, config: AdapterConfig, saved: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The layers that get an adapter by name; a layer with several names is there under each of them.

    Args:
        model: Without adapters.
        config: Says which layers are meant.
        saved: The modules that are trained in full, by name.

    Raises:
        ValueError: No layer is meant, an entry of a list means nothing, or a layer that is meant cannot be adapted.
    """
    in_saved = {id(module) for root in saved.values() for module in root.modules()}
    targets = _layers_meant(model, config, in_saved)
    attention = _layers_of_attention(model)
    inside: dict[str, str] = {}  # for every module around a target the first such target
    for name in targets:
        for outer in ancestors(name):
            inside.setdefault(outer, name)
    for name, layer in targets.items():
        if id(layer) in in_saved:
            raise ValueError(f"{name} is in target_modules and in modules_to_save={config.modules_to_save!r}: drop one")
        if id(layer) in attention:
            raise ValueError(
                f"{name} belongs to nn.MultiheadAttention ({attention[id(layer)]}), which reads the layer's weight and "
                f"never calls it, so an adapter there would be ignored: add {name.rpartition('.')[2]!r} to "
                "exclude_modules, or use attention that calls its linear layers"
            )
        if name in inside:
            raise ValueError(
                f"{inside[name]} lies inside of {name}, and only one of them can have an adapter: exclude one"
            )
        kind = adapter_class_of(layer)
        if kind is not None and (reason := kind.refusal(layer)) is not None:
            raise ValueError(f"{name} {reason}")
    suited = [name for name, module in model.named_modules() if adapter_class_of(module) is not None]
    _report_kinds_without_adapter(model, config, targets, in_saved)
    if not targets:
        _refuse_config_without_target(model, config, suited)
    _refuse_patterns_without_match("target_modules", config.target_modules, suited)
    _refuse_patterns_without_match("exclude_modules", config.exclude_modules, dict(model.named_modules()))
    _refuse_what_one_adapter_cannot_serve(model, targets)
    return targets


def _layers_meant(model: nn.Module, config: AdapterConfig, in_saved: set[int]) -> dict[str, nn.Module]:
    """The layers that ``target_modules`` means and ``exclude_modules`` does not, by every name that they have."""
    everything = config.target_modules == "all-linear"
    left_out = in_saved | _head_modules(model) if everything else set()
    excluded, named = matcher(config.exclude_modules), matcher(config.target_modules)
    meant = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        kind = adapter_class_of(layer)
        if not name or kind is None or excluded(name):
            continue
        chosen = kind.is_linear and id(layer) not in left_out if everything else named(name)
        if chosen:
            meant[name] = layer
    return meant


def _layers_of_attention(model: nn.Module) -> dict[int, str]:
    """For every layer inside an ``nn.MultiheadAttention``, the name of that."""
    return {
        id(layer): name
        for name, attention in model.named_modules()
        if isinstance(attention, nn.MultiheadAttention)
        for layer in attention.modules()
    }


def _report_kinds_without_adapter(
    model: nn.Module, config: AdapterConfig, targets: dict[str, nn.Module], in_saved: set[int]
) -> None:
    """Refuse an entry that means only layers of a kind without adapter; warn of such layers beside others."""
    if config.target_modules == "all-linear":
        return
    excluded = matcher(config.exclude_modules)
    without = {
        name: module
        for name, module in model.named_modules()
        if adapter_class_of(module) is None
        and not (id(module) in in_saved or excluded(name) or any(module.children()))
        and any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
    }
    adapted = meant_by(config.target_modules, targets)
    for entry, meant in meant_by(config.target_modules, without).items():
        if not meant:
            continue
        patterns = entry if isinstance(config.target_modules, str) else [entry]
        kind = type(without[meant[0]]).__name__
        what = f"{meant[0]} is a {kind}, a kind of layer without an adapter"
        if not adapted[entry]:
            raise ValueError(
                f"target_modules={patterns!r}: {what} (nn.Linear, Conv1D of transformers, nn.Conv2d and nn.Embedding "
                f"have one): leave it out, or write one and register_adapter({kind}, ...)"
            )
        warnings.warn(
            f"target_modules={patterns!r} also matches {len(meant)} layers that stay frozen: {what}",
            GeoLoRAWarning,
            stacklevel=2,
        )


def _refuse_config_without_target(model: nn.Module, config: AdapterConfig, suited: Sequence[str]) -> NoReturn:
    if config.target_modules == "auto":
        raise ValueError(
            "target_modules='auto' is for a GeoLoRAModule, which knows its own layers: name them, or 'all-linear'"
        )
    if config.target_modules == "all-linear" and (endings := _endings(convolutions(model))):
        raise ValueError(
            "target_modules='all-linear' matches no layer, because the model has no linear layer but its head; to "
            f"adapt its convolutions, set target_modules to {endings}"
        )
    raise ValueError(
        f"target_modules={config.target_modules!r} matches no layer that can be adapted (exclude_modules="
        f"{config.exclude_modules!r}); the model has "
        f"{', '.join(suited) + ': name some' if suited else 'none at all'}"
    )


def linear_layers(model: nn.Module) -> list[str]:
    """The names of the layers that ``all-linear`` means: every linear layer but the head."""
    head = _head_modules(model)
    return [
        name
        for name, layer in model.named_modules()
        if name and (kind := adapter_class_of(layer)) is not None and kind.is_linear and id(layer) not in head
    ]


def convolutions(model: nn.Module) -> list[str]:
    """The names of the layers of other kinds that suit an adapter: those of numbered blocks, if there are any.

    A depthwise convolution is left out, for its matrix is so thin that a low rank saves nothing.
    """
    head = _head_modules(model)
    names = [
        name
        for name, layer in model.named_modules()
        if name and (kind := adapter_class_of(layer)) is not None
        if not kind.is_linear and kind.refusal(layer) is None and id(layer) not in head
        if not (isinstance(layer, nn.Conv2d) and layer.in_channels == layer.groups > 1)
    ]
    return [name for name in names if re.search(r"\d+\..", name)] or names


def _endings(names: Iterable[str]) -> list[str]:
    """The last components of names, for ``target_modules``, but numbers, which would mean other layers too."""
    return sorted(ending for ending in {name.rpartition(".")[2] for name in names} if not ending.isdigit())


def _refuse_patterns_without_match(argument: str, patterns: str | Sequence[str], names: Iterable[str]) -> None:
    """Raise a ValueError for an entry of a list that matches nothing, since it is most likely misspelt."""
    names = list(names)
    for pattern, meant in ({} if isinstance(patterns, str) else meant_by(patterns, names)).items():
        if not meant:
            raise ValueError(
                f"{argument}={pattern!r} matches none of {', '.join(filter(None, names))}: drop or correct it"
            )


def check_rank_pattern(config: AdapterConfig, targets: Iterable[str]) -> None:
    """Raise a ValueError if a key of ``rank_pattern`` means none of the adapted layers."""
    names = list(targets)
    if absent := means_nothing(config.rank_pattern, names):
        raise ValueError(f"rank_pattern={absent[0]!r} matches none of the adapted layers {', '.join(names)}")


def _refuse_what_one_adapter_cannot_serve(model: nn.Module, targets: dict[str, nn.Module]) -> None:
    first: dict[int, str] = {}
    for name, layer in targets.items():
        other = first.setdefault(weight_identity(layer), name)
        if bias_of(targets[other]) is not bias_of(layer):
            raise ValueError(
                f"{other} and {name} share a weight but not their bias, which one adapter cannot serve: add one of "
                "them to exclude_modules"
            )
    embeddings = {weight_identity(layer): name for name, layer in targets.items() if isinstance(layer, nn.Embedding)}
    for name, module in model.named_modules():
        tied = embeddings.get(id(getattr(module, "weight", None)))
        if tied is not None and not isinstance(module, nn.Embedding):
            raise ValueError(
                f"{tied} shares its table with {name}, which would go on without the update: leave it out of "
                f"target_modules, or untie it: {name}.weight = nn.Parameter({name}.weight.clone())"
            )


def weight_identity(layer: nn.Module) -> int:
    """The identity of a layer's weight, which tied layers share; that of the layer if it stores none of that name."""
    weight = getattr(layer, "weight", None)
    return id(layer if weight is None or computed_tensor(layer) == "weight" else weight)


def bias_of(layer: nn.Module) -> object:
    """The bias of a layer, or ``None`` if its kind has none."""
    return getattr(layer, "bias", None)


def find_modules_to_save(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """The modules that are trained in full, by name.

    Raises:
        ValueError: A pattern matches no module.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    saved: dict[str, nn.Module] = {}
    for pattern, meant in meant_by(patterns, modules).items():
        if not meant:
            children = ", ".join(name for name, _ in model.named_children())
            raise ValueError(f"modules_to_save={pattern!r} matches no module; the model's own are {children}")
        saved |= {name: modules[name] for name in meant}
    return saved


def _head_modules(model: nn.Module) -> set[int]:
    """The modules of the task head: the classifier of timm and transformers, and whatever has a usual name of one."""
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


def config_of_each(config: AdapterConfig) -> Callable[[str], AdapterConfig]:
    """Give a layer its configuration: with the ranks that the first matching key of ``rank_pattern`` has for it."""
    rank_of = first_meant(config.rank_pattern)
    of_rank = {
        rank: replace(config, init_rank=rank, max_rank=max(rank, config.max_rank))
        for rank in set(config.rank_pattern.values())
    }
    return lambda name: config if (rank := rank_of(name)) is None else of_rank[rank]
