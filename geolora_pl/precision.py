"""In which precision things are held and multiplied."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of factors and retraction: float64 stays, everything else is float32.

    Example:
        >>> working_dtype(torch.bfloat16), working_dtype(torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would cast ``x`` to for a product; ``None`` where it would leave it alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def exact_products(device: torch.device) -> AbstractContextManager[object]:
    """A context in which products are formed in the precision of their factors, whatever autocast is around it."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
