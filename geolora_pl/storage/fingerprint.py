"""Tell one base model from another by a hash of the weights that training does not change."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import torch
from torch import Tensor, nn

from geolora_pl.adapters.inject import find_adapters
from geolora_pl.adapters.names import ancestors
from geolora_pl.adapters.statistics import whole_values
from geolora_pl.adapters.wrappers import unwrapped


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the model, by the names that they have without its adapters and wrappers.

    Example:
        >>> from geolora_pl import inject_adapters
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = inject_adapters(model)
        >>> list(base_parameters(model))
        ['0.weight', '0.bias']
    """
    found: dict[str, nn.Parameter] = {}
    adapters = find_adapters(model)
    with unwrapped(model) as plain:
        parameters = list(plain.named_parameters())
    for name, parameter in parameters:
        adapter = next((module for module in ancestors(name) if module in adapters), None)
        if adapter is None:
            found[name] = parameter
        elif (rest := name.removeprefix(f"{adapter}.")).startswith("base."):
            found[f"{adapter}.{rest.removeprefix('base.')}"] = parameter
    return found


def trained_names(model: nn.Module) -> list[str]:
    """The names of what is trained besides the adapters, such as a head, as in the model without adapters."""
    return [name for name, parameter in base_parameters(model).items() if parameter.requires_grad]


def refuse_frozen(model: nn.Module) -> None:
    """Refuse a model with adapters that was frozen as a whole: nothing tells any more what was trained beside them.

    Raises:
        ValueError: Nothing in it requires gradients.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "nothing in the model requires gradients, not even its adapters, so that a head which was trained beside "
            "them would be left out: save or export it before freeze() or requires_grad_(False), or call "
            "requires_grad_(True) on what was trained first"
        )


def base_hash(model: nn.Module, trained: Collection[str]) -> str:
    """SHA-256 of the base weights, with or without adapters around them, in all precisions that they may be loaded in.

    Weights are rounded to bfloat16 first, so that a base has the same hash in float32 and in bfloat16. A base in
    float16 has been rounded twice then, which is another rounding for some weights. Hence a wide base has a second
    hash, of its weights rounded to float16 first. Buffers are left out, because running means change in training.

    Args:
        model: The model; its weights must have values.
        trained: The names of :func:`trained_names`; these weights are left out.

    Returns:
        One or two times 64 hexadecimal digits, with a space in between; :func:`is_same_base` compares them.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> is_same_base(base_hash(model, []), base_hash(model.half(), []))
        True
    """
    digests, left_out = [hashlib.sha256(), hashlib.sha256()], frozenset(trained)
    for name, parameter in sorted(base_parameters(model).items()):
        if name not in left_out:
            weight = whole_values(parameter.detach())
            wide = weight.dtype in (torch.float32, torch.float64)
            for digest, rounded in zip(digests, (weight, weight.half() if wide else weight), strict=True):
                digest.update(f"{name} {list(parameter.shape)}".encode())
                digest.update(_bytes(rounded))
    return " ".join(dict.fromkeys(digest.hexdigest() for digest in digests))


def is_same_base(one: str, other: str) -> bool:
    """Whether two results of :func:`base_hash` are of one base, in whatever precision each was loaded.

    A base in bfloat16 and one in float16 cannot be told to be one, for both have lost what the other has kept.
    """
    return not set(one.split()).isdisjoint(other.split())


def _bytes(tensor: Tensor) -> bytes:
    if tensor.is_floating_point():
        tensor = tensor.to(torch.bfloat16)
    flat: bytes = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return flat
