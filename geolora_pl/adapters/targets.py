"""Which layers of a model get an adapter, and which modules are trained in full."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import nn

from geolora_pl.adapters.config import AdapterConfig
from geolora_pl.adapters.registry import adapter_class_of

# Names that libraries give to the part of a model that is made anew for each task.
_HEAD_NAMES = frozenset({"head", "heads", "classifier", "pre_classifier", "score", "lm_head", "qa_outputs"})


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
