"""Find the experts of a mixture, whose stacked weights have no adapters."""

from __future__ import annotations

from torch import nn

from geolora_pl.adapters.wrappers import unwrapped


def frozen_experts(model: nn.Module) -> str | None:
    """Say which experts of a model stay frozen, or ``None`` if there are none such.

    transformers 5 keeps the weights of all experts of a layer in parameters of three dimensions, which are no layers.

    Args:
        model: With adapters, or without.

    Example:
        >>> class Experts(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.down_proj = nn.Parameter(torch.zeros(4, 6, 8), requires_grad=False)
        >>> import torch
        >>> frozen_experts(nn.ModuleDict({"experts": Experts()}))
        'experts.down_proj: experts in a stacked weight have no adapters and stay frozen (192 parameters)'
    """
    with unwrapped(model) as plain:
        stacked = {
            f"{name}.{key}": parameter
            for name, module in plain.named_modules()
            if "expert" in name.rpartition(".")[2].lower() or "expert" in type(module).__name__.lower()
            for key, parameter in module.named_parameters(recurse=False)
            if parameter.dim() == 3 and not parameter.requires_grad
        }
    if not stacked:
        return None
    first, more = next(iter(stacked)), len(stacked) - 1
    several = f" and {more} more like it: experts in stacked weights" if more else ": experts in a stacked weight"
    size = sum(parameter.numel() for parameter in stacked.values())
    return f"{first}{several} have no adapters and stay frozen ({size:,} parameters)"
