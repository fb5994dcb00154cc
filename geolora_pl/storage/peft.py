"""Export adapters in the format of the PEFT library."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from geolora_pl.adapters.base import GeoLoRALayer
from geolora_pl.adapters.inject import find_adapters
from geolora_pl.adapters.kinds import GeoLoRAConv1D, GeoLoRAConv2d, GeoLoRAEmbedding
from geolora_pl.adapters.names import alternation, ancestors, matcher
from geolora_pl.adapters.registry import adapter_class_of
from geolora_pl.adapters.wrappers import unwrapped
from geolora_pl.errors import GeoLoRAWarning
from geolora_pl.math.decomposition import svd
from geolora_pl.math.precision import exact_products
from geolora_pl.storage.adapter_state import (
    AdapterState,
    Factors,
    adapted_names,
    capture,
)
from geolora_pl.storage.atomic import atomic
from geolora_pl.storage.fingerprint import base_parameters
from geolora_pl.storage.plain_file import plain_copies

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SIDE_A, SIDE_B = ".lora_A.weight", ".lora_B.weight"
_OF_VLLM = (8, 16, 32, 64, 128, 256, 320, 512)  # newer versions offer 1 as well
_TASK_TYPES = {  # by the endings of the classes of transformers
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}
_HEADS = {  # which PEFT expects among the saved modules
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def export_peft(model: nn.Module, out_dir: str | Path, *, compact: bool = False, overwrite: bool = False) -> int:
    r"""Write the adapters as a LoRA of PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``.

    .. math::
        \alpha U S V^T = B A, \qquad B = U P \sqrt{\alpha \Sigma} \; (m, r), \qquad
        A = \sqrt{\alpha \Sigma} Q^T V^T \; (r, n), \qquad S = P \Sigma Q^T

    By default every adapter is padded with zeros to the largest rank, and ``lora_alpha`` equals it, so that the
    scaling is 1. This is also correct in a loader that does not support ``rank_pattern``. Pending increments are folded
    in, at the ranks that the integrator would choose. Linear layers, ``Conv1D``, convolutions and embeddings are
    written, each as PEFT holds it. Trained modules are stored like ``modules_to_save`` of PEFT, and
    trained biases as with ``bias="all"``; most servers support neither. A warning names a buffer outside of them that
    has changed.

    Args:
        model: A model with adapters. It must be the model into which PEFT will load them, not a module around it;
            wrappers such as that of ``torch.compile`` are no part of the names in the file.
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
    lora = as_lora(model, compact=compact)
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in lora.tensors.items()}
    write_folder(Path(out_dir), lora.config, tensors, overwrite)
    return lora.rank


@dataclass(frozen=True)
class Lora:
    """What training changed in a model, as PEFT holds it.

    Attributes:
        config: The content of ``adapter_config.json``.
        tensors: The tensors by their names in the model.
        rank: The largest rank.
        extra: The tensors that are no sides of an adapter: modules to save and biases.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    rank: int
    extra: Sequence[str]


def as_lora(model: nn.Module, *, compact: bool = False, state: AdapterState | None = None) -> Lora:
    """The adapters of a model as a LoRA of PEFT, before it is written.

    Args:
        model: A model with adapters.
        compact: Whether each adapter keeps its own rank, as in :func:`export_peft`.
        state: What has been captured of the model already, for which the whole base is hashed.

    Raises:
        ValueError: The model has no adapters, or something was trained that PEFT cannot hold.
    """
    with unwrapped(model) as plain:
        return _as_lora(plain, compact, state or capture(plain))


def _as_lora(model: nn.Module, compact: bool, state: AdapterState) -> Lora:
    """The same of a plain model."""
    adapters = find_adapters(model)
    for name, layer in adapters.items():
        if (reason := _refusal(layer)) is not None:
            raise ValueError(f"{name} {reason}: merge the adapters instead")
    if shared := [name for name in adapted_names(model) if name not in adapters]:
        raise ValueError(f"{shared[0]} shares its adapter with another layer, which PEFT cannot hold: merge instead")
    if moved := [name for name, module in model.named_modules() if getattr(module, "track_running_stats", False)]:
        raise ValueError(
            f"{moved[0]} has running statistics, which training changes and PEFT would lose: merge instead"
        )
    tensors, settings, kept = lora_of(
        state.factors, state.config.alpha, compact, lambda name, A, B: _sides(name, adapters[name], A, B)
    )
    sides = len(tensors)
    saved, biases = _split_trained(model, state)
    for name in saved:
        tensors |= {f"{name}.{key}": value for key, value in model.get_submodule(name).state_dict().items()}
    for name in biases:
        owner = name.rpartition(".")[0]
        tensors[f"{owner}.base_layer.bias" if owner in kept else name] = state.trained[name]
    if lost := [name for name in state.buffers if name not in tensors]:
        warnings.warn(
            f"{lost[0]} is a buffer that has changed since the model got its adapters ({len(lost)} such), and a LoRA "
            "of PEFT does not hold it: if the outputs depend on it, merge instead, or use save_adapter",
            GeoLoRAWarning,
            stacklevel=4,
        )
    kinds = [type(adapters[name]) for name in kept]
    config = {
        "peft_type": "LORA",
        "task_type": _task_type(model, saved),
        "auto_mapping": {"base_model_class": type(model).__name__, "parent_library": type(model).__module__},
        "base_model_name_or_path": state.base_name,
        "inference_mode": True,
        **settings,
        "lora_dropout": state.config.dropout,
        "target_modules": _targets(model, kept),
        "modules_to_save": saved or None,
        "bias": "all" if biases else "none",
        "fan_in_fan_out": GeoLoRAConv1D in kinds
        and not any(isinstance(adapters[name].base, nn.Linear) for name in kept),
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
    return Lora(config, fit_to_write(tensors), int(settings["r"]), list(tensors)[sides:])


def linear_sides(name: str, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """A (rank, n) and B (m, rank) under the names that PEFT gives them in a linear layer."""
    return {f"{name}{SIDE_A}": A, f"{name}{SIDE_B}": B}


def lora_of(
    factors: Mapping[str, Factors],
    alpha: float,
    compact: bool,
    sides: Callable[[str, Tensor, Tensor], dict[str, Tensor]] = linear_sides,
) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """The sides of a LoRA as PEFT names them, the settings that say their ranks, and the layers that it has.

    The scaling is 1 everywhere.

    Args:
        factors: By the names of the layers.
        alpha: The scaling of the factors.
        compact: Whether each is stored at its own rank, and those of rank 0 left out unless all are; or else all are
            padded with zeros to the largest.
        sides: Gives A (rank, n) and B (m, rank) of a layer the names and shapes of its kind.
    """
    ranks = {name: U.shape[1] for name, (U, _, _) in factors.items()}
    largest = max(1, *ranks.values())
    if compact and any(ranks.values()):
        kept = {name: rank for name, rank in ranks.items() if rank}
    else:
        kept = dict.fromkeys(ranks, largest)
    tensors: dict[str, Tensor] = {}
    for name, r in kept.items():
        tensors |= sides(name, *_lora(factors[name], alpha, r))
    pattern = {_anchored(name): r for name, r in kept.items()} if compact else {}
    settings = {"r": largest, "lora_alpha": largest, "rank_pattern": pattern, "alpha_pattern": pattern}
    return tensors, settings, list(kept)


def write_folder(out_dir: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], overwrite: bool) -> None:
    """Write the folder of a LoRA, completely or not at all.

    Raises:
        ValueError: The folder exists.
    """
    with atomic(out_dir, overwrite=overwrite) as unfinished:
        unfinished.mkdir()
        (unfinished / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        save_file(dict(tensors), unfinished / WEIGHTS, {"format": "pt"})


def fit_to_write(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of finite tensors that a file can hold.

    Raises:
        ValueError: A value is not finite.
    """
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{broken[0]} is not finite, so nothing is exported: go back to a checkpoint before it")
    return plain_copies(tensors)


def server_rank(rank: int) -> str:
    """Say which rank a server must allow, and which of those that vLLM offers is the next.

    Example:
        >>> server_rank(11)
        'a server must allow rank 11 (vLLM: --max-lora-rank 16)'
    """
    offered = next((offer for offer in _OF_VLLM if offer >= rank), None)
    of_vllm = f"--max-lora-rank {offered}" if offered else f"at most {_OF_VLLM[-1]}, so it cannot serve this"
    return f"a server must allow rank {rank} (vLLM: {of_vllm})"


def _refusal(layer: GeoLoRALayer) -> str | None:
    """Why PEFT cannot hold an adapter, as the end of a sentence about its layer; ``None`` if it can."""
    if is_linear(layer.base) or isinstance(layer, GeoLoRAEmbedding):
        return None
    if not isinstance(layer, GeoLoRAConv2d):
        return f"is a {type(layer.base).__name__}, and the export to PEFT knows no such layer"
    for name, only in (("groups", 1), ("dilation", (1, 1)), ("padding_mode", "zeros")):
        if (value := getattr(layer.base, name)) != only:
            return f"has {name}={value!r}, which PEFT's LoRA of a convolution does not honour"
    return None


def _sides(name: str, layer: GeoLoRALayer, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """A (rank, n) and B (m, rank) in the shapes and under the names that PEFT gives them in this kind of layer."""
    if isinstance(layer, GeoLoRAEmbedding):
        return {f"{name}.lora_embedding_A": A, f"{name}.lora_embedding_B": B}
    if isinstance(layer, GeoLoRAConv2d):
        A, B = A.reshape(-1, *layer.base.weight.shape[1:]), B[:, :, None, None]
    return linear_sides(name, A, B)


def _task_type(model: nn.Module, saved: Sequence[str]) -> str | None:
    """What PEFT calls the task of a model of transformers, by which ``AutoPeftModelFor...`` finds the model's class.

    ``None`` where PEFT would look in the file for a head that was not trained.
    """
    name = type(model).__name__
    of_transformers = type(model).__module__.startswith("transformers.")
    task = next((task for ending, task in _TASK_TYPES.items() if of_transformers and name.endswith(ending)), None)
    heads = {head for head in _HEADS.get(task or "", ()) if hasattr(model, head)}
    return task if heads <= set(saved) else None


def is_linear(layer: nn.Module) -> bool:
    """Whether PEFT's LoRA of a linear layer fits it; this includes GPT-2's ``Conv1D`` (``fan_in_fan_out``)."""
    return isinstance(layer, nn.Linear) or adapter_class_of(layer) is GeoLoRAConv1D


def _lora(factors: Factors, alpha: float, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, n) and B (m, rank) with evenly shared singular values, and zeros beyond the live rank."""
    P, sigma, Qh = svd(factors.S)
    root = (alpha * sigma).sqrt()
    padding = (0, rank - len(root))
    with exact_products(factors.U.device):
        A = nn.functional.pad(factors.V @ Qh.mT * root, padding).mT
        B = nn.functional.pad(factors.U @ P * root, padding)
    return A, B


def _anchored(name: str) -> str:
    """An expression for one layer alone in PEFT's patterns, which are matched against the end of a name."""
    return f"^{re.escape(name)}"


def _targets(model: nn.Module, names: Sequence[str]) -> list[str] | str:
    """The whole names of the layers, or one expression if a name is also the end of another layer's name."""
    others = {name for name, _ in model.named_modules()}.difference(names)
    return alternation(names) if any(map(matcher(names), others)) else sorted(names)


def _split_trained(model: nn.Module, state: AdapterState) -> tuple[list[str], list[str]]:
    """What was trained besides the adapters: whole modules to save, and the names of single biases."""
    adapters = find_adapters(model)
    parameters = base_parameters(model)
    trained = {id(parameters[name]) for name in state.trained}
    # All names are needed, because PEFT keeps one copy per module for modules that share a weight.
    owners = {
        name: _owner(name)
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
    outside = {found for name in adapters for found in (*ancestors(name), name)}
    saved: set[str] = set()
    for name in whole:
        # PEFT saves every module whose name ends so, dot or not.
        for found in (other for other in modules if other.endswith(name)):
            if found in outside:
                raise ValueError(f"{name} was trained, and PEFT would take {found}, which has an adapter, for it")
            saved.add(found)
    return sorted(saved), [name for name in state.trained if _owner(name) not in saved]


def _owner(name: str) -> str:
    """The module of a parameter; of one that a parametrization computes with, the module that it computes for."""
    return name.rpartition(".")[0].partition(".parametrizations.")[0]
