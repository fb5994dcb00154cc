"""What a batch changes in training without an optimizer: the running statistics of a model, and its other buffers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from geolora_pl.adapters.base import GeoLoRALayer

_BEFORE = "_geolora_buffers"  # the attribute in which a module remembers its buffers as they were without adapters


def running_statistics(model: nn.Module, recurse: bool = True) -> dict[str, Tensor]:
    """The buffers of the normalisations that follow their batches, such as ``nn.BatchNorm2d``, by name.

    Args:
        model: Any module.
        recurse: Whether those of the modules inside of it belong to them.

    Example:
        >>> list(running_statistics(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))))
        ['1.running_mean', '1.running_var', '1.num_batches_tracked']
    """
    return {
        f"{prefix}{name}": buffer
        for module_name, module in (model.named_modules() if recurse else [("", model)])
        if getattr(module, "track_running_stats", False)
        for prefix in [f"{module_name}." if module_name else ""]
        for name, buffer in module.named_buffers(recurse=False)
    }


def remember_buffers(model: nn.Module) -> None:
    """Let every module of a model remember its buffers, so that :func:`changed_buffers` can tell which have changed.

    Running statistics need not be remembered, and those inside of adapters belong to frozen layers.
    """
    for module, _, buffers in _other_buffers(model):
        digests = {name: _digest(buffer) for name, buffer in buffers.items() if not buffer.is_meta}
        setattr(module, _BEFORE, digests)


def changed_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that training may have changed since the model got its adapters, by name.

    Those are its running statistics, and every other buffer outside of the adapters and in the state dict whose values
    are not those that :func:`remember_buffers` has seen. A module that remembers nothing counts as changed.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> model.register_buffer("mask", torch.ones(4))
        >>> model.register_buffer("seen", torch.zeros(1))
        >>> remember_buffers(model)
        >>> model.seen += 1
        >>> list(changed_buffers(model))
        ['seen']
    """
    found = running_statistics(model)
    for module, prefix, buffers in _other_buffers(model):
        before = getattr(module, _BEFORE, {})
        found |= {prefix + name: buffer for name, buffer in buffers.items() if before.get(name) != _digest(buffer)}
    return found


def _other_buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, dict[str, Tensor]]]:
    """The modules with buffers in the state dict that are no running statistics, outside of adapters.

    With each come the prefix of its names, and these buffers.
    """
    within = {id(part) for module in model.modules() if isinstance(module, GeoLoRALayer) for part in module.modules()}
    saved = model.state_dict()
    for module_name, module in model.named_modules():
        if id(module) in within or getattr(module, "track_running_stats", False):
            continue
        prefix = f"{module_name}." if module_name else ""
        if buffers := {name: b for name, b in module.named_buffers(recurse=False) if prefix + name in saved}:
            yield module, prefix, buffers


def whole_values(tensor: Tensor) -> Tensor:
    """The values of a tensor that is sharded, or whose class keeps fewer bits, as plain numbers."""
    if hasattr(tensor, "full_tensor"):  # sharded
        tensor = tensor.full_tensor()
    if type(tensor).dequantize is not Tensor.dequantize:  # a tensor class for quantised weights, as torchao has
        tensor = tensor.dequantize()
    return tensor


def _digest(buffer: Tensor) -> str:
    """A hash of the values, which a cast that keeps them does not change."""
    values = whole_values(buffer.detach()).cpu()
    if values.layout is not torch.strided:
        sparse = values.to_sparse_coo().coalesce()
        return _digest(sparse.indices()) + _digest(sparse.values())
    values = values.double() if values.is_floating_point() else values
    content = values.contiguous().flatten().numpy().tobytes()
    return hashlib.sha256(f"{list(values.shape)}".encode() + content).hexdigest()
