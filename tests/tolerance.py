"""How far two computations of one thing may be apart: as far as rounding takes them, on any processor.

Kernels differ in the order in which they add, in how they cut a sum into parts, and in whether a product is rounded
before it is added; processors have different kernels, and so have different numbers of threads. A sum of n terms is
off by about ``eps sqrt(n)`` of the largest of them. A tolerance here is that, with room, and of the largest value
there is: a value that is small because its terms cancel is no more exact than the others. It is never a number that
was read off one machine.
"""

import math

import torch
from torch import Tensor

from geolora_pl.functional import orthonormality_defect

LAYER = 64  # terms of the longest sum in one layer of the tests, about
NETWORK = 4096  # of the sums in one network, one after the other; each layer may magnify what those before it rounded
EXACT = 1e-10  # for networks and short runs in float64: half a million times its rounding, a thousandth of float32's
RUN = 1e-9  # for runs in float64 with Adam, which makes steps of gradients that are small by cancellation


def rounding(dtype: torch.dtype, terms: int = LAYER) -> float:
    """What two sums of so many terms may be apart, relative to the largest value: ``16 eps sqrt(terms)``."""
    return 16 * torch.finfo(dtype).eps * math.sqrt(terms)


def largest(*tensors: Tensor) -> float:
    """The largest absolute value that there is; 0 among no values."""
    return max((float(tensor.detach().abs().max()) for tensor in tensors if tensor.numel()), default=0.0)


def close(
    actual: Tensor,
    expected: Tensor,
    terms: int = LAYER,
    *,
    within: float | None = None,
    beside: Tensor | None = None,
) -> None:
    """Assert that two tensors are equal up to rounding.

    Args:
        actual: What was computed.
        expected: What it should be, of the same shape and type.
        terms: How many terms are summed on the way to one value.
        within: The relative tolerance, in the place of that of a sum of so many terms.
        beside: Of what the values are a difference, if they are one: the largest of it sets the scale.
    """
    allowed = rounding(expected.dtype, terms) if within is None else within
    scale = largest(expected if beside is None else beside)
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=0, atol=allowed * scale)


def is_orthonormal(basis: Tensor) -> bool:
    """Whether the columns that are not zero are orthonormal up to rounding."""
    return float(orthonormality_defect(basis.detach())) <= rounding(basis.dtype, basis.numel())
