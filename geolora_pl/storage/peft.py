"""Export adapters in the format of the PEFT library, and import a LoRA of PEFT as a start."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from geolora_pl.adapters.inject import find_adapters, has_adapters
from geolora_pl.adapters.kinds import GeoLoRAConv1D
from geolora_pl.adapters.registry import adapter_class_of
from geolora_pl.math.decomposition import svd, svd_of_product
from geolora_pl.math.precision import exact_products, working_dtype
from geolora_pl.storage.adapter_state import (
    AdapterState,
    Factors,
    apply,
    base_buffers,
    base_name,
    capture,
    config_of,
    leading,
)
from geolora_pl.storage.atomic import atomic
from geolora_pl.storage.fingerprint import base_parameters

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
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
    "monteclora_config",
    "megatron_config",
)
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # other starts also change the base weights


def export_peft(model: nn.Module, out_dir: str | Path, *, compact: bool = False, overwrite: bool = False) -> int:
    r"""Write the adapters as a LoRA of PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``.

    .. math::
        \alpha U S V^T = B A, \qquad B = U P \sqrt{\alpha \Sigma} \; (m, r), \qquad
        A = \sqrt{\alpha \Sigma} Q^T V^T \; (r, n), \qquad S = P \Sigma Q^T

    By default every adapter is padded with zeros to the largest rank, and ``lora_alpha`` equals it, so that the
    scaling is 1. This is also correct in a loader that does not support ``rank_pattern``. Pending increments are folded
    in, at the ranks that the integrator would choose. Trained modules are stored like ``modules_to_save`` of PEFT, and
    trained biases as with ``bias="all"``; most servers support neither.

    Args:
        model: A model with adapters. It must be the model into which PEFT will load them, not a module around it.
        out_dir: The folder to make.
        compact: Whether to store each adapter at its own rank, with ``rank_pattern`` and ``alpha_pattern``, and to
            leave out adapters of rank 0.
        overwrite: Whether to replace an existing folder.

    Returns:
        The rank that a server must allow (``max_lora_rank`` of vLLM).

    Raises:
        ValueError: The model has no adapters, ``out_dir`` exists, or something was trained that PEFT cannot hold.

    Example:
        >>> import tempfile
        >>> from geolora_pl import AdapterConfig, inject_adapters
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = inject_adapters(model, AdapterConfig(init_rank=2))
        >>> export_peft(model, Path(tempfile.mkdtemp(), "lora"))
        2
    """
    state = capture(model)
    adapters = find_adapters(model)
    if odd := [name for name, layer in adapters.items() if not _is_linear(layer.base)]:
        raise ValueError(f"{odd[0]} is not a linear layer, and the export to PEFT supports no others: merge instead")
    aliases = [name for name, module in model.named_modules(remove_duplicate=False) if module in set(adapters.values())]
    if shared := [name for name in aliases if name not in adapters]:
        raise ValueError(f"{shared[0]} shares its adapter with another layer, which PEFT cannot hold: merge instead")
    if moved := [name for name, module in model.named_modules() if getattr(module, "track_running_stats", False)]:
        raise ValueError(
            f"{moved[0]} has running statistics, which training changes and PEFT would lose: merge instead"
        )
    ranks = {name: factors.U.shape[1] for name, factors in state.factors.items()}
    rank = max(1, *ranks.values())
    if compact and any(ranks.values()):
        kept = {name: rank for name, rank in ranks.items() if rank}
    else:
        kept = dict.fromkeys(ranks, rank)
    tensors: dict[str, Tensor] = {}
    for name, r in kept.items():
        A, B = _lora(state.factors[name], state.config.alpha, r)
        tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
    saved, biases = _split_trained(model, state)
    for name in saved:
        tensors |= {f"{name}.{key}": value for key, value in model.get_submodule(name).state_dict().items()}
    for name in biases:
        layer = name.rpartition(".")[0]
        tensors[f"{layer}.base_layer.bias" if layer in kept else name] = state.trained[name]
    tensors = {f"{_PREFIX}{name}": tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{broken[0]} is not finite, so nothing is exported: go back to a checkpoint before it")
    pattern = {_anchored(name): r for name, r in kept.items()} if compact else {}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": state.base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": state.config.dropout,
        "target_modules": _targets(model, list(kept)),
        "modules_to_save": saved or None,
        "bias": "all" if biases else "none",
        "fan_in_fan_out": not any(isinstance(adapters[name].base, nn.Linear) for name in kept),
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
    }
    with atomic(out_dir, overwrite=overwrite) as unfinished:
        unfinished.mkdir()
        (unfinished / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        save_file(tensors, unfinished / _WEIGHTS, {"format": "pt"})
    return rank


def import_peft(model: nn.Module, folder: str | Path, max_rank: int = 16) -> None:
    r"""Start from a LoRA of PEFT: the model gets adapters that compute exactly what the LoRA computes.

    .. math:: s B A = U S V^T, \qquad s = \texttt{lora\_alpha} / r \text{ or } \texttt{lora\_alpha} / \sqrt r

    The factors are computed by QR of both sides and the SVD of the small core; ``alpha`` is 1. Directions that are
    only rounding are dropped. The modules in ``modules_to_save`` are loaded and trainable.

    Args:
        model: The plain base of the LoRA.
        folder: The folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        max_rank: Number of columns allocated per adapter; a LoRA of a larger rank gets as many columns as its rank.

    Raises:
        ValueError: The folder is broken, holds another kind of adapter such as DoRA, or does not fit the model; the
            model does not change then.

    Example:
        >>> import tempfile
        >>> from geolora_pl import inject_adapters
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
    folder = Path(folder)
    config, tensors = _read(folder)
    sides, others = _sides(tensors)
    parameters, buffers = dict(model.named_parameters()), base_buffers(model)
    others = _by_first_name(others, model, folder)
    _refuse_misfits(others, {**buffers, **parameters}, folder)
    modules = dict(model.named_modules())
    factors: dict[str, Factors] = {}
    max_ranks: dict[str, int] = {}
    for name, pair in sides.items():
        layer = modules.get(name)
        if layer is None or not _is_linear(layer):
            raise ValueError(
                f"{folder}: {name} is not a linear layer of the model: take the base that it was trained on"
            )
        factors[name] = _geolora(name, pair, config, folder)
        max_ranks[name] = min(max(max_rank, pair["A"].shape[0]), *layer.weight.shape)
    if not factors:
        raise ValueError(f"{folder} holds no LoRA of a linear layer")
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


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of a LoRA, which are finite."""
    try:
        config = json.loads((folder / _CONFIG).read_text())
        tensors = load_file(folder / _WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no readable {_CONFIG} and {_WEIGHTS}: {error}") from error
    _refuse_other_kinds(config, folder)
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{folder}: {key} is not finite; fetch or save it again")
    return config, tensors


def _sides(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The sides A and B by layer, and everything else by its name in the plain model."""
    sides: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name, side, _ = key.removeprefix(_PREFIX).partition(".lora_A.weight")
        if not side:
            name, side, _ = key.removeprefix(_PREFIX).partition(".lora_B.weight")
        if side:
            sides.setdefault(name, {})[side[6]] = tensor
        else:
            others[name.replace(".base_layer.", ".")] = tensor
    return sides, others


def _refuse_misfits(others: Mapping[str, Tensor], there: Mapping[str, Tensor], folder: Path) -> None:
    """Refuse weights that the model does not have, or has in another shape."""
    for name, tensor in others.items():
        if name not in there or there[name].shape != tensor.shape:
            was = f"is {tuple(there[name].shape)} in the model" if name in there else "is not in the model"
            raise ValueError(f"{folder}: {name} {tuple(tensor.shape)} {was}: take the base that it was trained on")


def _is_linear(layer: nn.Module) -> bool:
    """Whether PEFT's LoRA of a linear layer fits it; this includes GPT-2's ``Conv1D`` (``fan_in_fan_out``)."""
    return isinstance(layer, nn.Linear) or adapter_class_of(layer) is GeoLoRAConv1D


def _by_first_name(tensors: Mapping[str, Tensor], model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """The tensors by the first name of their parameter, because a shared parameter has several names."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    names = {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not torch.equal(found.setdefault(names.get(name, name), tensor), tensor):
            raise ValueError(f"{folder}: {names[name]} has two values but is one weight in the model: untie it")
    return found


def _lora(factors: Factors, alpha: float, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, n) and B (m, rank) with evenly shared singular values, and zeros beyond the live rank."""
    P, sigma, Qh = svd(factors.S)
    root = (alpha * sigma).sqrt()
    padding = (0, rank - len(root))
    with exact_products(factors.U.device):
        A = nn.functional.pad(factors.V @ Qh.mT * root, padding).mT
        B = nn.functional.pad(factors.U @ P * root, padding)
    return A, B


def _geolora(name: str, pair: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> Factors:
    r = _by_pattern(config.get("rank_pattern"), name, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
    if pair.keys() != {"A", "B"} or pair["A"].dim() != 2 or not len(pair["A"]) == pair["B"].shape[-1] == r:
        shapes = ", ".join(f"lora_{side} {tuple(tensor.shape)}" for side, tensor in sorted(pair.items()))
        raise ValueError(f"{folder}: {name} has {shapes}, which are not the two sides of a LoRA of rank {r}")
    scaling = alpha / (r**0.5 if config.get("use_rslora") else r)
    A, B = pair["A"].double(), pair["B"].double()
    # A direction must be larger than the rounding of the precision in which the factors are kept.
    dtype = working_dtype(pair["A"].dtype)
    return leading(*(tensor.to(dtype) for tensor in svd_of_product(scaling * B, A.mT, r)))


def _by_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The entry for a layer, chosen as PEFT does: the first one whose expression matches the end of the name."""
    found = (value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", name))
    return next(found, default)


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
    if wrong := [name for name in ("r", "lora_alpha") if not isinstance(config.get(name), (int, float))]:
        raise ValueError(f"{folder}: {_CONFIG} has {wrong[0]}={config.get(wrong[0])!r}, which must be a number")


def _anchored(name: str) -> str:
    """An expression for one layer alone in PEFT's patterns, which are matched against the end of a name."""
    return f"^{re.escape(name)}"


def _targets(model: nn.Module, names: Sequence[str]) -> list[str] | str:
    """The whole names of the layers, or one expression if a name is also the end of another layer's name."""
    everything = [name for name, _ in model.named_modules() if name not in set(names)]
    if any(other.endswith(f".{name}") for name in names for other in everything):
        return f"({'|'.join(map(re.escape, names))})"
    return sorted(names)


def _split_trained(model: nn.Module, state: AdapterState) -> tuple[list[str], list[str]]:
    """What was trained besides the adapters: whole modules to save, and the names of single biases."""
    adapters = find_adapters(model)
    parameters = base_parameters(model)
    trained = {id(parameters[name]) for name in state.trained}
    # All names are needed, because PEFT keeps one copy per module for modules that share a weight.
    owners = {
        name: name.rpartition(".")[0]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in trained
    }
    of_bases = {f"{name}.base" for name in adapters}
    if odd := [name for name, owner in owners.items() if owner in of_bases and not name.endswith("bias")]:
        raise ValueError(f"{odd[0]} was trained beside an adapter, which PEFT cannot hold: merge the adapters instead")
    whole = {owner for name, owner in owners.items() if not name.endswith("bias")}
    if bare := [name for name, owner in owners.items() if owner == ""]:
        raise ValueError(f"{bare[0]} was trained and is in no module that PEFT could save: merge the adapters instead")
    modules = dict(model.named_modules(remove_duplicate=False))
    saved: set[str] = set()
    for name in whole:
        # PEFT saves every module whose name ends so, dot or not.
        for found in (other for other in modules if other.endswith(name)):
            if any(f"{adapter}.".startswith(f"{found}.") for adapter in adapters):
                raise ValueError(f"{name} was trained, and PEFT would take {found}, which has an adapter, for it")
            saved.add(found)
    return sorted(saved), [name for name in state.trained if name.rpartition(".")[0] not in saved]
