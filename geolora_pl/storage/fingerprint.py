"""Tell one base model from another by a hash of the weights that training does not change."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import torch
from torch import Tensor, nn

from geolora_pl.adapters.base import FACTORS
from geolora_pl.adapters.inject import find_adapters


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the model, by the names that they have without its adapters.

    Example:
        >>> from geolora_pl import inject_adapters
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = inject_adapters(model)
        >>> list(base_parameters(model))
        ['0.weight', '0.bias']
    """
    factors, of_base = set(), {}
    for adapter in find_adapters(model):
        factors |= {f"{adapter}.{factor}" for factor in FACTORS}
        of_base[f"{adapter}.base."] = f"{adapter}."
    found = {}
    for name, parameter in model.named_parameters():
        if name in factors:
            continue
        prefix = name[: name.rfind(".base.") + len(".base.")]
        found[name.replace(prefix, of_base[prefix], 1) if prefix in of_base else name] = parameter
    return found


def trained_names(model: nn.Module) -> list[str]:
    """The names of what is trained besides the adapters, such as a head, as in the model without adapters."""
    return [name for name, parameter in base_parameters(model).items() if parameter.requires_grad]


def base_hash(model: nn.Module, trained: Collection[str]) -> str:
    """SHA-256 of the base weights, with or without adapters around them.

    Weights are rounded to bfloat16 first, so that a base has the same hash in every precision in which it is loaded.
    Buffers are left out, because running means change in training.

    Args:
        model: The model; its weights must have values.
        trained: The names of :func:`trained_names`; these weights are left out.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> base_hash(model, []) == base_hash(model.bfloat16(), [])
        True
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(base_parameters(model).items()):
        if name not in trained:
            digest.update(f"{name} {list(parameter.shape)}".encode())
            digest.update(_bytes(parameter.detach()))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    if hasattr(tensor, "full_tensor"):  # sharded
        tensor = tensor.full_tensor()
    if type(tensor).dequantize is not Tensor.dequantize:  # a tensor class for quantised weights, as torchao has
        tensor = tensor.dequantize()
    if tensor.is_floating_point():
        tensor = tensor.to(torch.bfloat16)
    flat: bytes = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return flat
