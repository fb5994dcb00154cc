"""The precision in which factors are held, squares are summed and products are formed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of factors and retraction: float64 stays, everything else is float32.

    Example:
        >>> working_dtype(torch.bfloat16), working_dtype(torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def summing_dtype(device: torch.device) -> torch.dtype:
    """The precision in which squares are added up: float64, or float32 on Apple's GPUs, which have no other.

    Example:
        >>> summing_dtype(torch.device("cpu"))
        torch.float64
    """
    return torch.float32 if device.type == "mps" else torch.float64


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_autocast(device: str) -> bool:
    """Whether there is autocast for a type of device, a constant to the compiler: torch 2.8 cannot trace the call."""
    return torch.amp.is_autocast_available(device)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would cast ``x`` to for a product; ``None`` where it would leave it alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not _has_autocast(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which products are formed in the type of their factors, whatever autocast is around it."""
    if not _has_autocast(device.type) or not torch.is_autocast_enabled(device.type):
        return nullcontext()  # must be quick, since every layer asks twice per step
    return torch.autocast(device.type, enabled=False)


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """A context in which float32 products are formed in float32: neither in autocast's type nor in TF32.

    For bases, which one product in TF32 leaves orthonormal to three digits only. Not for a forward or backward pass,
    where the user may have chosen that speed.
    """
    with without_autocast(device):
        put_back = _form_exactly(device)
        try:
            yield
        finally:
            put_back()


def _form_exactly(device: torch.device) -> Callable[[], None]:
    """Tell torch to form float32 products in float32, and return a function that restores the user's setting."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # the user has set fp32_precision (torch 2.9), and torch refuses a mix of both
        matmul = (torch.backends.mkldnn if device.type == "cpu" else torch.backends.cuda).matmul
        told, matmul.fp32_precision = matmul.fp32_precision, "ieee"

        def put_back() -> None:
            matmul.fp32_precision = "none"  # first follow the more general settings, as it may have done before
            if matmul.fp32_precision != told:
                matmul.fp32_precision = told

        return put_back
    if precision == "highest":
        return lambda: None
    torch.set_float32_matmul_precision("highest")
    return partial(torch.set_float32_matmul_precision, precision)
