"""Take what training has changed out of one model, check it, and put it into another model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from geolora_pl.adapters.base import FACTORS, GeoLoRALayer
from geolora_pl.adapters.config import AdapterConfig
from geolora_pl.adapters.inject import find_adapters, has_adapters, inject_adapters, remove_adapters
from geolora_pl.adapters.names import alternation, ancestors, names_in
from geolora_pl.adapters.statistics import changed_buffers, running_statistics
from geolora_pl.adapters.wrappers import unwrapped
from geolora_pl.math.decomposition import decompose, without_probes
from geolora_pl.math.precision import exact_products
from geolora_pl.math.ranks import RankRule, ranks_by_tau, ranks_of_each_by_budget, resolution
from geolora_pl.storage.fingerprint import base_hash, base_parameters, is_same_base, refuse_frozen, trained_names


class Factors(NamedTuple):
    """One adapter at its live rank r: U (m, r), S (r, r), V (n, r)."""

    U: Tensor
    S: Tensor
    V: Tensor


@dataclass(frozen=True)
class AdapterState:
    """What training has changed in a model, without the model.

    Attributes:
        config: The configuration that puts the same adapters into the base; it names each layer with its ``max_rank``.
        factors: The adapters by name.
        trained: Whatever else was trained, by its name in the base.
        buffers: The base's buffers that training has changed, such as running means.
        base_name: The name of the base, if it has one.
        base_hash: The hash of :func:`geolora_pl.storage.fingerprint.base_hash`, without ``trained``.
    """

    config: AdapterConfig
    factors: Mapping[str, Factors]
    trained: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    base_name: str | None
    base_hash: str

    @property
    def max_ranks(self) -> dict[str, int]:
        """The number of columns allocated for each adapter."""
        ranks = {name: rank for names, rank in self.config.rank_pattern.items() for name in names_in(names)}
        return {name: ranks[name] for name in self.factors}


def config_of(
    max_ranks: Mapping[str, int], alpha: float = 1.0, dropout: float = 0.0, probes: int = AdapterConfig.probes
) -> AdapterConfig:
    """The configuration that adapts exactly these layers.

    Layers of one rank are in one expression: with one for each layer, a model of many layers would take minutes.

    Example:
        >>> config_of({"0": 4}).target_modules
        '(0)'
    """
    of_rank: dict[int, list[str]] = {}
    for name, rank in max_ranks.items():
        of_rank.setdefault(rank, []).append(name)
    return AdapterConfig(
        init_rank=1,
        max_rank=1,  # rank_pattern gives each layer its own
        target_modules=alternation(max_ranks),
        alpha=alpha,
        dropout=dropout,
        rank_pattern={alternation(names): rank for rank, names in of_rank.items()},
        probes=probes,
    )


@torch.no_grad()
def retracted(adapters: Mapping[str, GeoLoRALayer]) -> dict[str, Factors]:
    """The adapters with their pending increments folded in and without their probes; the layers stay as they are.

    Without pending increments the factors are copied bit for bit. With increments the sum is decomposed again, and the
    rule of the integrator chooses the ranks, as in a retraction; without a rule all directions are kept that are larger
    than rounding, at most ``max_rank``. Directions that were admitted and never took a step are left out.

    Args:
        adapters: By name.
    """
    rule = next((layer.rule for layer in adapters.values() if layer.rule is not None), None)
    with exact_products(next(iter(adapters.values())).U.device):
        points = {name: _point(layer) for name, layer in adapters.items()}
        ranks = {name: _rank(layer, points[name], rule) for name, layer in adapters.items()}
    if rule is not None and rule.budget is not None:
        sigmas = {name: point.sigma for name, point in points.items()}
        costs = {name: layer.in_features + layer.out_features for name, layer in adapters.items()}
        ranks = ranks_of_each_by_budget(sigmas, ranks, costs, rule.budget, rule.min_rank)
    return {
        name: Factors(U[:, :r].clone(), S[:r, :r].clone(), V[:, :r].clone())
        for name, (U, S, V, _, _) in points.items()
        for r in [ranks[name]]
    }


class _Point(NamedTuple):
    """One adapter at the columns that it may be written with, and the singular values of what it computes."""

    U: Tensor
    S: Tensor
    V: Tensor
    sigma: Tensor
    pending: bool


def _point(layer: GeoLoRALayer) -> _Point:
    U, S, V, K, L = without_probes(layer.U, layer.S, layer.V, layer.K, layer.L)
    if not (K.any() or L.any()):
        r = layer.rank
        return _Point(U[:, :r], S[:r, :r], V[:, :r], S.diagonal()[:r].abs(), pending=False)
    step = decompose(U, S, V, K, L)
    return _Point(step.U, torch.diag(step.sigma[: U.shape[1]]), step.V, step.sigma, pending=True)


def _rank(layer: GeoLoRALayer, point: _Point, rule: RankRule | None) -> int:
    if rule is not None and rule.keeps_ranks:
        return layer.rank
    if point.pending:
        smallest = resolution(len(point.U), len(point.V), point.sigma.dtype)
        tau, least = (0.0, 0) if rule is None else (rule.tau, min(rule.min_rank, layer.max_rank))
        return int(ranks_by_tau(point.sigma, tau, smallest, least, layer.max_rank))
    used = (point.S != 0).any(0) | (point.S != 0).any(1)
    if rule is None or not used.any():
        return layer.rank
    return max(int(used.nonzero().max()) + 1, min(rule.min_rank, layer.rank))


def leading(U: Tensor, sigma: Tensor, V: Tensor) -> Factors:
    """Those of the singular triplets U (m, R), sigma (at least R), V (n, R) that are larger than rounding."""
    m, n, R = len(U), len(V), U.shape[1]
    r = int(ranks_by_tau(sigma, 0.0, resolution(m, n, sigma.dtype), 0, R))
    return Factors(U[:, :r].contiguous(), torch.diag(sigma[:r]), V[:, :r].contiguous())


def capture(model: nn.Module) -> AdapterState:
    """Copy what training has changed in a model.

    Args:
        model: A model with adapters.

    Raises:
        ValueError: The model has no adapters, they differ in ``alpha``, ``dropout`` or ``probes``, or all is frozen.
    """
    adapters = find_adapters(model)
    if not adapters:
        raise ValueError("the model holds no adapters: there is nothing to save; inject_adapters(model) first")
    refuse_frozen(model)
    kinds = {(layer.scaling, getattr(layer.dropout, "p", 0.0), layer.probes) for layer in adapters.values()}
    if len(kinds) > 1:
        raise ValueError(f"the adapters differ in (alpha, dropout, probes), {sorted(kinds)}: give all of them the same")
    ((alpha, dropout, probes),) = kinds
    for name, layer in adapters.items():
        if not all(getattr(layer, factor).isfinite().all() for factor in FACTORS):
            raise ValueError(f"{name} holds values that are not finite: go back to a checkpoint before it")
    with unwrapped(model) as plain:
        buffers = changed_buffers(plain)
        statistics = running_statistics(plain)
    if broken := [name for name, buffer in statistics.items() if not buffer.isfinite().all()]:
        raise ValueError(f"{broken[0]} holds values that are not finite: go back to a checkpoint before it")
    names = trained_names(model)
    parameters = base_parameters(model)
    config = config_of({name: layer.max_rank for name, layer in adapters.items()}, alpha, dropout, probes)
    return AdapterState(
        config=replace(config, target_modules=alternation(adapted_names(model))),
        factors=retracted(adapters),
        trained={name: parameters[name].detach().clone() for name in names},
        buffers={name: buffer.detach().clone() for name, buffer in buffers.items()},
        base_name=base_name(model),
        base_hash=base_hash(model, names),
    )


def adapted_names(model: nn.Module) -> list[str]:
    """All names of adapters: a layer that has several, or shares its weight, must be adapted under each of them."""
    with unwrapped(model) as plain:
        return [n for n, module in plain.named_modules(remove_duplicate=False) if isinstance(module, GeoLoRALayer)]


def check(model: nn.Module, state: AdapterState) -> None:
    """Refuse a state that does not belong to a model; the model stays as it is.

    Raises:
        ValueError: The base, a layer or a shape is another one.
    """
    if has_adapters(model) and (problem := misfit(model, state)):
        raise ValueError(problem)
    check_base(model, state)


def check_base(model: nn.Module, state: AdapterState) -> None:
    """Refuse a state that belongs to another base, whatever adapters the model has; the model stays as it is.

    Raises:
        ValueError: The base, a name or a shape is another one.
    """
    with unwrapped(model) as plain:
        modules = dict(plain.named_modules())
    if absent := [name for name in state.factors if name not in modules]:
        raise ValueError(
            f"the model has no layer {absent[0]}, which the adapter is for: take the base that it was trained on"
        )
    there: dict[str, Tensor] = {**base_parameters(model), **base_buffers(model)}
    for name, tensor in {**state.trained, **state.buffers}.items():
        if name not in there:
            raise ValueError(
                f"the model has no {name}, which was trained with the adapter: take the base that it was trained on"
            )
        if tensor.shape != there[name].shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} in the adapter and {tuple(there[name].shape)} in the model: build "
                "the model with the same head (number of classes)"
            )
    if not is_same_base(base_hash(model, state.trained), state.base_hash):
        raise ValueError(
            f"the adapter was trained on another base ({state.base_name or 'without a name'}): the frozen weights of "
            "this model differ; load the base that it was trained on, in float32 or in the precision of its training, "
            "and quantised as it was then"
        )


def misfit(model: nn.Module, state: AdapterState) -> str | None:
    """Why the adapters in a model cannot take a state, or ``None`` if they can."""
    adapters = find_adapters(model)
    if differ := sorted(set(adapters) ^ set(state.factors)):
        where = "in the model" if differ[0] in adapters else "in the file"
        what = f"{differ[0]} has an adapter only {where} ({len(differ)} such layers)"
        return f"{what}: inject no adapters, because loading puts them in"
    for name, (U, _, V) in state.factors.items():
        layer = adapters[name]
        if (len(U), len(V)) != (len(layer.U), len(layer.V)):
            return f"{name} is {len(U)} x {len(V)} in the file and {len(layer.U)} x {len(layer.V)} in the model"
        if U.shape[1] > layer.max_rank:
            return f"{name} has rank {U.shape[1]} in the file and max_rank={layer.max_rank} in the model: raise it"
        if layer.scaling != state.config.alpha:
            return f"alpha={layer.scaling} does not fit the file, which has {state.config.alpha}: set it to that"
    return None


@torch.no_grad()
def apply(model: nn.Module, state: AdapterState) -> None:
    """Put a state that :func:`check` has passed into a model, completely or not at all.

    A plain model gets the adapters, and what was trained becomes trainable again. In a model with adapters the
    parameters stay the same objects.

    Raises:
        ValueError: A layer cannot be adapted, or has another shape.
    """
    if has_adapters(model):
        if problem := misfit(model, state):
            raise ValueError(problem)
    else:
        requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        inject_adapters(model, replace(state.config, train_bias=False, modules_to_save=()))
        if problem := misfit(model, state):
            remove_adapters(model)
            for parameter, required in requires_grad:
                parameter.requires_grad_(required)
            raise ValueError(problem)
    parameters = base_parameters(model)
    for name in state.trained:
        parameters[name].requires_grad_(True)
    for name, layer in find_adapters(model).items():
        U, S, V = state.factors[name]
        r = U.shape[1]
        for factor in (layer.U, layer.S, layer.V, layer.K, layer.L):
            factor.zero_()
        p = layer.probes  # which stay zero until the first retraction
        layer.U[:, p : p + r], layer.S[:r, :r], layer.V[:, p : p + r] = U.to(layer.U), S.to(layer.U), V.to(layer.U)
        layer.rank = r
        layer.rule = None  # that of an earlier fit would cut these when they are saved
    write(model, {**state.trained, **state.buffers})


@torch.no_grad()
def write(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the parameters and buffers of the base, by name."""
    there: dict[str, Tensor] = {**base_parameters(model), **base_buffers(model)}
    for name, tensor in tensors.items():
        there[name].copy_(tensor)


def base_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers outside the adapters that a state dict holds, by name."""
    adapters = find_adapters(model)
    with unwrapped(model) as plain:
        saved, buffers = plain.state_dict(), dict(plain.named_buffers())
    return {
        name: buffer
        for name, buffer in buffers.items()
        if name in saved and not any(module in adapters for module in ancestors(name))
    }


def base_name(model: nn.Module) -> str | None:
    """The name that transformers or timm give a model, or the model inside a wrapper."""
    with unwrapped(model) as plain:
        candidates = (plain, *plain.children())
    for module in candidates:
        if isinstance(name := getattr(module, "name_or_path", None), str) and name:
            return name
        config = getattr(module, "pretrained_cfg", None)
        if isinstance(config, Mapping) and config.get("architecture"):
            return ".".join(filter(None, (config["architecture"], config.get("tag"))))
    return None
