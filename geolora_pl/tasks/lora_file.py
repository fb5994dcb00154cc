"""Write the adapters of a pipeline as the LoRA file that diffusers and most programs for drawing load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from geolora_pl.adapters.inject import has_adapters
from geolora_pl.storage.peft import Lora, as_lora


def save_lora(pipeline_class: Any, parts: Mapping[str, nn.Module], folder: Path, compact: bool = False) -> int:
    """Write ``pytorch_lora_weights.safetensors`` for ``load_lora_weights``.

    By default every adapter of a part is padded with zeros to its largest rank, and no alpha is written, which every
    loader reads as a scaling of 1.

    Args:
        pipeline_class: The class of the pipeline that will load it.
        parts: The UNet and the text encoders that may have adapters, by the names that diffusers gives them.
        folder: An empty folder.
        compact: Whether each adapter keeps its own rank; the file then says how they are to be read.

    Returns:
        The largest rank.

    Raises:
        ValueError: Something was trained that such a file cannot hold.
    """
    for name, part in parts.items():
        if not has_adapters(part):
            _refuse_others(name, [key for key, parameter in part.named_parameters() if parameter.requires_grad])
    loras = {name: as_lora(part, compact=compact) for name, part in parts.items() if has_adapters(part)}
    layers: dict[str, Any] = {}
    for name, lora in loras.items():
        _refuse_others(name, [*lora.extra, *(key for key in lora.tensors if ".lora_embedding_" in key)])
        # Such files call a layer of a text encoder as it was called before its model lost the outer wrapper.
        prefix = "" if name == "unet" or hasattr(parts[name], "text_model") else "text_model."
        # The names are those of PEFT throughout: diffusers tells by the first one how all others are to be read, and
        # its own converter would leave convolutions as they are beside renamed attention layers.
        layers[f"{name}_lora_layers"] = {f"{prefix}{key}": tensor for key, tensor in lora.tensors.items()}
        if compact:
            layers[f"{name}_lora_adapter_metadata"] = _metadata(lora)
    pipeline_class.save_lora_weights(folder, **layers)
    return max(lora.rank for lora in loras.values())


def _refuse_others(name: str, others: Sequence[str]) -> None:
    if others:
        raise ValueError(
            f"{name}.{others[0]} was trained, which a LoRA file of diffusers cannot hold: take peft or merged"
        )


def _metadata(lora: Lora) -> dict[str, Any]:
    """The settings of PEFT by which the ranks are read; a name is that of a layer, with or without a wrapper."""
    patterns = {
        name: {key.removeprefix("^"): rank for key, rank in lora.config[name].items()}
        for name in ("rank_pattern", "alpha_pattern")
    }
    return {**{name: lora.config[name] for name in ("r", "lora_alpha", "target_modules")}, **patterns}
