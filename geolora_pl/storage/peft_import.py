"""Import a LoRA of the PEFT library as a start."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from geolora_pl.adapters.inject import has_adapters
from geolora_pl.adapters.names import ancestors, first_meant
from geolora_pl.adapters.registry import adapter_class_of
from geolora_pl.adapters.wrappers import unwrapped
from geolora_pl.math.decomposition import svd_of_product
from geolora_pl.math.precision import working_dtype
from geolora_pl.storage.adapter_state import (
    AdapterState,
    Factors,
    apply,
    base_buffers,
    base_name,
    config_of,
    leading,
)
from geolora_pl.storage.hub import located
from geolora_pl.storage.peft import CONFIG, PREFIX, SIDE_A, SIDE_B, WEIGHTS, is_linear

# These settings of PEFT's LoRA change what the adapter computes, so that it is not a plain LoRA.
_OTHER_KINDS = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "megatron_config",
)
_LARGEST = 10_000_000  # bytes of a configuration, which has a line per layer
_MOST = 2**31  # of a rank, and of alpha: what is above is no setting, and calculates to no number
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # other starts also change the base weights


def import_peft(
    model: nn.Module,
    folder: str | Path,
    max_rank: int = 16,
    *,
    revision: str | None = None,
    token: str | None = None,
) -> None:
    r"""Start from a LoRA of PEFT: the model gets adapters that compute exactly what the LoRA computes.

    .. math:: s B A = U S V^T, \qquad s = \texttt{lora\_alpha} / r \text{ or } \texttt{lora\_alpha} / \sqrt r

    The factors are computed by QR of both sides and the SVD of the small core; ``alpha`` is 1. Directions that are
    only rounding are dropped. The modules in ``modules_to_save`` are loaded and trainable.

    Args:
        model: The plain base of the LoRA.
        folder: The folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or the name of a repository
            on the hub that holds them, ``user/name``; a path that exists goes first.
        max_rank: Number of columns allocated per adapter; a LoRA of a larger rank gets as many columns as its rank.
        revision: A branch, tag or commit of the repository.
        token: For a private repository; by default the one of ``hf auth login`` or ``HF_TOKEN``.

    Raises:
        ValueError: The folder is broken or cannot be fetched, holds another kind of adapter such as DoRA, or does not
            fit the model; the model does not change then.

    Example:
        >>> import tempfile
        >>> from geolora_pl import export_peft, inject_adapters
        >>> model, folder = nn.Sequential(nn.Linear(8, 8)), Path(tempfile.mkdtemp(), "lora")
        >>> _ = inject_adapters(model)
        >>> _ = export_peft(model, folder)
        >>> fresh = nn.Sequential(nn.Linear(8, 8))
        >>> import_peft(fresh, folder)
    """
    if has_adapters(model):
        raise ValueError("the model already has adapters: merge_adapters(model) first, or take a fresh model")
    if max_rank < 1:
        raise ValueError(f"max_rank={max_rank} must be at least 1")
    found = located(folder, revision, token, lora=True)
    with unwrapped(model) as plain:
        _import(plain, found, max_rank)


def _import(model: nn.Module, folder: Path, max_rank: int) -> None:
    """Put a LoRA into a plain model."""
    config, tensors = read_lora(folder)
    sides, others = sides_of(tensors)
    parameters, buffers = dict(model.named_parameters()), base_buffers(model)
    others = _without_base_weights(others, config, model)
    _refuse_untied(others, config, model, folder)
    others = _by_first_name(others, model, folder)
    _refuse_misfits(others, {**buffers, **parameters}, folder)
    modules = dict(model.named_modules())
    max_ranks: dict[str, int] = {}
    for name, pair in sides.items():
        layer = modules.get(name)
        if isinstance(layer, nn.Conv2d):
            raise ValueError(
                f"{folder}: {name} is a Conv2d, and only LoRAs on linear layers are imported: merge it into its base "
                "with PEFT (merge_and_unload) first"
            )
        if layer is None or not is_linear(layer):
            raise ValueError(
                f"{folder}: {name} is not a linear layer of the model: take the base that it was trained on"
            )
        kind = adapter_class_of(layer)
        assert kind is not None, "linear layers have an adapter"
        # Not of the weight, which may be codes of another shape.
        max_ranks[name] = min(max(max_rank, pair["A"].shape[0]), *kind.matrix_shape(layer))
    if not sides:
        raise ValueError(f"{folder} holds no LoRA of a linear layer")
    factors = factors_of(sides, config, folder)
    apply(
        model,
        AdapterState(
            config=config_of(max_ranks, dropout=config.get("lora_dropout") or 0.0),
            factors=factors,
            trained={name: tensor for name, tensor in others.items() if name in parameters},
            buffers={name: tensor for name, tensor in others.items() if name in buffers},
            base_name=base_name(model),
            base_hash="",  # PEFT stores no hash
        ),
    )


def read_lora(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of a LoRA, which are finite."""
    if (folder / "adapter_model.bin").is_file() and not (folder / WEIGHTS).exists():
        raise ValueError(
            f"{folder} holds adapter_model.bin, whose format may run code: load it with PEFT and save it again "
            f"(save_pretrained), which writes {WEIGHTS}"
        )
    try:
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():  # a pipe would be waited for
                raise ValueError(f"{name} is not a file")
        if (folder / CONFIG).stat().st_size > _LARGEST:  # it would be held in memory, several times
            raise ValueError(f"{CONFIG} is larger than {_LARGEST:,} bytes")
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG} holds no settings by name")
    except (OSError, ValueError, SafetensorError, RecursionError) as error:
        raise ValueError(f"{folder} holds no readable {CONFIG} and {WEIGHTS}: {error}") from error
    _refuse_other_kinds(config, folder)
    if on_embedding := [key for key in tensors if ".lora_embedding_" in key]:
        raise ValueError(
            f"{folder}: {on_embedding[0]} is a LoRA on an embedding, and only those on linear layers are imported: "
            "merge it into its base with PEFT (merge_and_unload) first"
        )
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{folder}: {key} is not finite; fetch or save it again")
    return config, tensors


def sides_of(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The sides A and B by layer, and everything else by its name in the plain model."""
    sides: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        for letter, ending in (("A", SIDE_A), ("B", SIDE_B)):
            if name.endswith(ending):
                sides.setdefault(name.removesuffix(ending), {})[letter] = tensor
                break
        else:
            others[name.replace(".base_layer.", ".")] = tensor
    return sides, others


def _refuse_misfits(others: Mapping[str, Tensor], there: Mapping[str, Tensor], folder: Path) -> None:
    """Refuse weights that the model does not have, or has in another shape."""
    for name, tensor in others.items():
        if name not in there or there[name].shape != tensor.shape:
            was = f"is {tuple(there[name].shape)} in the model" if name in there else "is not in the model"
            raise ValueError(f"{folder}: {name} {tuple(tensor.shape)} {was}: take the base that it was trained on")


def _by_first_name(tensors: Mapping[str, Tensor], model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """The tensors by the first name of their parameter, because a shared parameter has several names."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    names = {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not torch.equal(found.setdefault(names.get(name, name), tensor), tensor):
            raise ValueError(f"{folder}: {names[name]} has two values but is one weight in the model: untie it")
    return found


def _without_base_weights(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], model: nn.Module
) -> dict[str, Tensor]:
    """Without the weights of the base that PEFT saves beside a LoRA on an embedding or a head, and has not trained."""
    copied = _modules_to_save(config)
    there = dict(model.named_parameters(remove_duplicate=False))

    def is_of_base(name: str, tensor: Tensor) -> bool:
        if not name.endswith(".weight") or any(module.endswith(copied) for module in ancestors(name)):
            return False
        return name in there and torch.equal(tensor, there[name].to("cpu", tensor.dtype))

    return {name: tensor for name, tensor in tensors.items() if not is_of_base(name, tensor)}


def _modules_to_save(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The ends of the names of modules that PEFT has trained in full, each as a copy."""
    saved = config.get("modules_to_save")
    return tuple(map(str, saved)) if isinstance(saved, list) else ()


def _refuse_untied(tensors: Mapping[str, Tensor], config: Mapping[str, Any], model: nn.Module, folder: Path) -> None:
    """Refuse a module that PEFT has trained as a copy of its own, where the model has one weight for it and another."""
    copied = _modules_to_save(config)
    of_parameter: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        of_parameter.setdefault(id(parameter), []).append(name)
    for names in of_parameter.values():
        alone = [
            name for name in names if name in tensors and any(module.endswith(copied) for module in ancestors(name))
        ]
        if alone and (others := [name for name in names if name not in tensors]):
            raise ValueError(
                f"{folder}: {alone[0]} was trained apart from {others[0]}, which is the same weight in the model: "
                f"untie them first (model.{alone[0]} = nn.Parameter(model.{alone[0]}.clone()))"
            )


def factors_of(
    sides: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any], folder: Path
) -> dict[str, Factors]:
    """The factors of every layer's update, scaling included.

    Args:
        sides: The two sides of every LoRA by the name of its layer.
        config: The configuration in the folder.
        folder: Where they come from, for messages.

    Raises:
        ValueError: The sides are not those of a LoRA of the rank in the configuration.
    """
    # As PEFT chooses them: the first key whose expression matches the end of the name.
    rank_of, alpha_of = (
        first_meant(config.get(pattern) or {}, r"(.*\.)?({})") for pattern in ("rank_pattern", "alpha_pattern")
    )
    found = {}
    for name, pair in sides.items():
        r, alpha = rank_of(name), alpha_of(name)
        r, alpha = config["r"] if r is None else r, config["lora_alpha"] if alpha is None else alpha
        _check_sides(name, pair, r, folder)
        scaling = alpha / (r**0.5 if config.get("use_rslora") else r)
        A, B = pair["A"].double(), pair["B"].double()
        # A direction must be larger than the rounding of the precision in which the factors are kept.
        dtype = working_dtype(pair["A"].dtype)
        found[name] = leading(*(tensor.to(dtype) for tensor in svd_of_product(scaling * B, A.mT, r)))
    return found


def _check_sides(name: str, pair: Mapping[str, Tensor], r: object, folder: Path) -> None:
    complete = pair.keys() == {"A", "B"} and pair["A"].dim() == pair["B"].dim() == 2
    if not (complete and len(pair["A"]) == pair["B"].shape[1] == r != 0):
        shapes = ", ".join(f"lora_{side} {tuple(tensor.shape)}" for side, tensor in sorted(pair.items()))
        raise ValueError(f"{folder}: {name} has {shapes}, which are not the two sides of a LoRA of rank {r}")


def _refuse_other_kinds(config: Mapping[str, Any], folder: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{folder} holds an adapter of the type {config.get('peft_type')!r}: only LORA can be imported"
        )
    if other := [name for name in _OTHER_KINDS if config.get(name)]:
        raise ValueError(
            f"{folder} has {other[0]}={config[other[0]]!r}, which is more than a plain LoRA: merge it with PEFT"
        )
    if (start := config.get("init_lora_weights")) not in _PLAIN_STARTS:
        raise ValueError(
            f"{folder} has init_lora_weights={start!r}, which also changed the base weights: convert it to a plain "
            "LoRA with PEFT (path_initial_model_for_weight_conversion) first"
        )
    for name, pattern, said in (("r", "rank_pattern", "a whole number"), ("lora_alpha", "alpha_pattern", "a number")):
        by_name = config.get(pattern) or {}
        if not isinstance(by_name, dict):
            raise ValueError(f"{folder}: {CONFIG} has {pattern}={by_name!r}, which must map names to numbers")
        for key in by_name:
            _refuse_slow_expression(key, folder)
        for value in (config.get(name), *by_name.values()):
            is_kind = isinstance(value, int) or (isinstance(value, float) and name == "lora_alpha")
            if not is_kind or not abs(value) < _MOST:
                raise ValueError(f"{folder}: {CONFIG} has {name}={value!r} (or so in {pattern}): it must be {said}")


def _refuse_slow_expression(expression: str, folder: Path) -> None:
    """Refuse what is not a regular expression, or one that could take for ever to match a name.

    Those repeat what repeats itself, or repeat often; the names that PEFT writes do neither.
    """
    try:
        re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{folder}: {expression!r} in {CONFIG} is not a regular expression ({error})") from error
    if re.search(r"\)[*+{]", expression) or len(re.findall(r"[*+{]", expression)) > 3:
        raise ValueError(
            f"{folder}: {expression!r} in {CONFIG} may take for ever to match: write the names of the layers there"
        )
