"""Export adapters in the format of the PEFT library."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from geolora_pl.adapters.inject import find_adapters
from geolora_pl.adapters.kinds import GeoLoRAConv1D
from geolora_pl.adapters.registry import adapter_class_of
from geolora_pl.adapters.wrappers import unwrapped
from geolora_pl.math.decomposition import svd
from geolora_pl.math.precision import exact_products
from geolora_pl.storage.adapter_state import (
    AdapterState,
    Factors,
    capture,
)
from geolora_pl.storage.atomic import atomic
from geolora_pl.storage.fingerprint import base_parameters

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
    in, at the ranks that the integrator would choose. Trained modules are stored like ``modules_to_save`` of PEFT, and
    trained biases as with ``bias="all"``; most servers support neither.

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
    with unwrapped(model) as plain:
        return _export(plain, Path(out_dir), compact, overwrite)


def _export(model: nn.Module, out_dir: Path, compact: bool, overwrite: bool) -> int:
    """Write the folder of a plain model."""
    state = capture(model)
    adapters = find_adapters(model)
    if odd := [name for name, layer in adapters.items() if not is_linear(layer.base)]:
        raise ValueError(f"{odd[0]} is not a linear layer, and the export to PEFT supports no others: merge instead")
    aliases = [name for name, module in model.named_modules(remove_duplicate=False) if module in set(adapters.values())]
    if shared := [name for name in aliases if name not in adapters]:
        raise ValueError(f"{shared[0]} shares its adapter with another layer, which PEFT cannot hold: merge instead")
    if moved := [name for name, module in model.named_modules() if getattr(module, "track_running_stats", False)]:
        raise ValueError(
            f"{moved[0]} has running statistics, which training changes and PEFT would lose: merge instead"
        )
    tensors, settings = lora_of(state.factors, state.config.alpha, compact)
    kept = [name.removeprefix(PREFIX).removesuffix(SIDE_A) for name in tensors if name.endswith(SIDE_A)]
    saved, biases = _split_trained(model, state)
    for name in saved:
        tensors |= {f"{PREFIX}{name}.{key}": value for key, value in model.get_submodule(name).state_dict().items()}
    for name in biases:
        layer = name.rpartition(".")[0]
        tensors[PREFIX + (f"{layer}.base_layer.bias" if layer in kept else name)] = state.trained[name]
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
        "fan_in_fan_out": not any(isinstance(adapters[name].base, nn.Linear) for name in kept),
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
    write_folder(out_dir, config, tensors, overwrite)
    return int(settings["r"])


def lora_of(factors: Mapping[str, Factors], alpha: float, compact: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a LoRA as PEFT names them, and the settings that say their ranks; the scaling is 1 everywhere.

    Args:
        factors: By the names of the layers.
        alpha: The scaling of the factors.
        compact: Whether each is stored at its own rank, and those of rank 0 left out unless all are; or else all are
            padded with zeros to the largest.
    """
    ranks = {name: U.shape[1] for name, (U, _, _) in factors.items()}
    largest = max(1, *ranks.values())
    if compact and any(ranks.values()):
        kept = {name: rank for name, rank in ranks.items() if rank}
    else:
        kept = dict.fromkeys(ranks, largest)
    tensors: dict[str, Tensor] = {}
    for name, r in kept.items():
        tensors[f"{PREFIX}{name}{SIDE_A}"], tensors[f"{PREFIX}{name}{SIDE_B}"] = _lora(factors[name], alpha, r)
    pattern = {_anchored(name): r for name, r in kept.items()} if compact else {}
    return tensors, {"r": largest, "lora_alpha": largest, "rank_pattern": pattern, "alpha_pattern": pattern}


def write_folder(out_dir: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], overwrite: bool) -> None:
    """Write the folder of a LoRA, completely or not at all.

    Raises:
        ValueError: A value is not finite, or the folder exists.
    """
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{broken[0]} is not finite, so nothing is exported: go back to a checkpoint before it")
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    with atomic(out_dir, overwrite=overwrite) as unfinished:
        unfinished.mkdir()
        (unfinished / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        save_file(plain, unfinished / WEIGHTS, {"format": "pt"})


def server_rank(rank: int) -> str:
    """Say which rank a server must allow, and which of those that vLLM offers is the next.

    Example:
        >>> server_rank(11)
        'a server must allow rank 11 (vLLM: --max-lora-rank 16)'
    """
    offered = next((offer for offer in _OF_VLLM if offer >= rank), None)
    of_vllm = f"--max-lora-rank {offered}" if offered else f"at most {_OF_VLLM[-1]}, so it cannot serve this"
    return f"a server must allow rank {rank} (vLLM: {of_vllm})"


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
