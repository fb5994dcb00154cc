"""The only door of this folder to private names of torch; docs/architecture.md says why each is needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks would run if the module were called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules right inside of a module under every name; ``named_children`` gives each only once."""
    return [(name, child) for name, child in module._modules.items() if child is not None]


def is_transformed() -> bool:
    """Whether ``torch.func`` (vmap, grad, ...), forward-mode differentiation or ``torch.jit.trace`` is under way."""
    if torch.compiler.is_compiling():  # which looks into such transforms itself
        return False
    return torch.jit.is_tracing() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def reshaped(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The same values in another shape, and not as a view, for autograd and for FSDP2, which treat views apart."""
    return torch.ops.aten._unsafe_view(x, shape)  # type: ignore[no-any-return]


def convolve(like: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    """Convolve with a weight of one's own, and with stride, padding (and its mode), dilation and groups of a layer."""
    convolved: Tensor = like._conv_forward(x, weight, None)
    return convolved
