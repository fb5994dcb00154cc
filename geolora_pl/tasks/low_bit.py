"""How the weights of a model of transformers are held: in 16 bits, or quantised to 8 or 4."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, TorchAoConfig
from transformers.quantizers.base import HfQuantizer
from transformers.utils.import_utils import (
    is_accelerate_available,
    is_bitsandbytes_available,
    is_flash_attn_2_available,
    is_kernels_available,
    is_torchao_available,
)

from geolora_pl.adapters.names import matcher, meant_by
from geolora_pl.adapters.quantised import dequantise
from geolora_pl.adapters.targets import find_modules_to_save

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Attention = Literal["eager", "sdpa", "flash_attention_2"]

# What a mapping may say besides the bits: settings of BitsAndBytesConfig with 4, of TorchAoConfig with 8. The 8 bits of
# bitsandbytes are not there, because its layers leave their scales behind when Lightning moves the model to a GPU.
_SETTINGS: Mapping[int, Mapping[str, type | tuple[str, ...]]] = {
    4: {
        "bnb_4bit_quant_type": ("nf4", "fp4"),
        "bnb_4bit_use_double_quant": bool,
        "bnb_4bit_compute_dtype": ("bfloat16", "float32"),  # not float16, to which it would round biases of float32
        "llm_int8_skip_modules": list,
    },
    8: {"modules_to_not_convert": list},
}


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Refuse a value that is not one of the choices.

    Raises:
        ValueError: It is something else.
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(str, choices))}")


def dtype_of(name: Dtype, config: PreTrainedConfig) -> torch.dtype:
    """Return the type that a name stands for; with ``auto`` that of the configuration, if it says one."""
    said = config.dtype if name == "auto" else name
    dtype = getattr(torch, said) if isinstance(said, str) else said
    return dtype if isinstance(dtype, torch.dtype) else torch.get_default_dtype()


def check_quantization(quantization: Mapping[str, Any]) -> None:
    """Refuse a mapping that says something else than how many bits, and how.

    Raises:
        ValueError: The bits or a setting are unknown, or have a value of another kind.
    """
    if not isinstance(quantization, Mapping) or (bits := quantization.get("bits")) not in (4, 8):
        raise ValueError(f"quantization={quantization!r} must say {{bits: 4}} or {{bits: 8}}")
    for name, value in quantization.items():
        if name == "bits":
            continue
        if (kind := _SETTINGS[bits].get(name)) is None:
            known = ", ".join(_SETTINGS[bits])
            raise ValueError(f"quantization.{name}={value!r} is not a setting with {bits} bits: choose among {known}")
        if isinstance(kind, tuple):
            check_choice(f"quantization.{name}", value, kind)
        elif not (_are_names(value) if kind is list else isinstance(value, kind)):
            what = "a list of names of modules" if kind is list else "true or false"
            raise ValueError(f"quantization.{name}={value!r} must be {what}")


def _are_names(value: object) -> bool:
    """Whether a value is a list of names; transformers takes them for patterns, which can be made to match for ever."""
    return isinstance(value, list) and all(isinstance(v, str) and re.fullmatch(r"[\w.]+", v) for v in value)


def quantization_config(
    quantization: Mapping[str, Any], dtype: torch.dtype, left: list[str]
) -> BitsAndBytesConfig | TorchAoConfig:
    """Make the configuration by which transformers quantises a model while it loads the weights.

    Args:
        quantization: The mapping that :func:`check_quantization` has passed.
        dtype: The type in which 4-bit layers compute, unless the mapping says it.
        left: The names of the modules that stay as they are.

    Raises:
        ValueError: A library is missing.
    """
    bits = quantization["bits"]
    library, is_there = ("bitsandbytes", is_bitsandbytes_available) if bits == 4 else ("torchao", is_torchao_available)
    if missing := [
        name for name, there in ((library, is_there), ("accelerate", is_accelerate_available)) if not there()
    ]:
        raise ValueError(
            f"quantization={dict(quantization)!r} needs {' and '.join(missing)}: pip install 'geolora_pl[lowbit]'"
        )
    if bits == 4:
        usual = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
        given = {name: value for name, value in quantization.items() if name.startswith("bnb_")}
        return BitsAndBytesConfig(load_in_4bit=True, **{**usual, **given}, llm_int8_skip_modules=left)
    from torchao.quantization import Int8WeightOnlyConfig

    # Otherwise it would let float32 products of the whole process be formed in less.
    kind = Int8WeightOnlyConfig(set_inductor_config=False)
    return TorchAoConfig(kind, modules_to_not_convert=left)


def keep_quantization(config: PreTrainedConfig, of_file: PreTrainedConfig) -> None:
    """Let a configuration say, as that of the file does, that weights are stored as codes; or say nothing of it."""
    if (stored := getattr(of_file, "quantization_config", None)) is not None:
        config.quantization_config = stored


def modules_left_plain(model: PreTrainedModel, trained: Sequence[str], quantization: Mapping[str, Any]) -> list[str]:
    """Return the whole names of the modules that are not quantised; for torchao an ending would mean nothing.

    Those are what is trained in full, the output layer, and what the user names.

    Args:
        model: The model, which needs no weights.
        trained: Names and name endings of what is trained in full.
        quantization: The mapping that :func:`check_quantization` has passed.

    Raises:
        ValueError: A name matches no module.
    """
    setting = "llm_int8_skip_modules" if quantization["bits"] == 4 else "modules_to_not_convert"
    names = [name for name, _ in model.named_modules() if name]
    named = quantization.get(setting, [])
    if absent := [entry for entry, meant in meant_by(named, names).items() if not meant]:
        raise ValueError(f"quantization.{setting}={absent!r} matches no module: drop or correct it")
    left = [*find_modules_to_save(model, trained), *filter(matcher(named), names)]
    return sorted(HfQuantizer.get_modules_to_not_convert(model, left, add_default_skips=True))


def check_attention(attention: Attention) -> Attention:
    """Refuse an implementation of attention that this machine cannot have.

    Raises:
        ValueError: It needs a package or a device that is not there.
    """
    if attention == "flash_attention_2" and not (is_flash_attn_2_available() or is_kernels_available()):
        raise ValueError(
            "attn_implementation='flash_attention_2' needs a GPU and the package flash-attn: install it, or take sdpa"
        )
    return attention


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Let the blocks of a model compute their activations twice.

    Raises:
        ValueError: The model has no blocks that can.
    """
    if not model.supports_gradient_checkpointing:
        raise ValueError(f"gradient_checkpointing: {type(model).__name__} cannot do it: set it to false")
    # The first is the name since transformers 5.23, which warns of the second.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def widen(model: nn.Module, names: Iterable[str], outputs: torch.dtype | None) -> None:
    """Hold modules that are trained in full in float32, in a model of less, where small steps would be rounded away.

    Args:
        model: The model.
        names: The names of the modules, whose inputs are cast.
        outputs: The type that their outputs are cast to, for what follows in the model; ``None`` for none.
    """
    for name in names:
        module = model.get_submodule(name).float()
        module.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
        if outputs is not None:
            module.register_forward_hook(partial(_cast_outputs, outputs))


def _cast_inputs(module: nn.Module, args: Any, kwargs: Any) -> Any:
    dtype = next(module.parameters()).dtype
    return tuple(_cast(value, dtype) for value in args), {name: _cast(value, dtype) for name, value in kwargs.items()}


def _cast_outputs(dtype: torch.dtype, module: nn.Module, args: Any, output: Any) -> Any:
    return _cast(output, dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def forget_quantization(model: PreTrainedModel) -> None:
    """Make a quantised model plain whose adapters are merged, in the type of its configuration, in place."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        dequantise(model)
        quantizer.remove_quantization_config(model)
        nn.Module.to(model, dtype=dtype_of("auto", model.config))
