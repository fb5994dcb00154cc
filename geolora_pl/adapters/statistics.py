"""The running statistics of a model: what a batch changes in training without an optimizer."""

from __future__ import annotations

from torch import Tensor, nn


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
