"""Several processes, one decision: the results of rank 0 replace those of the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from geolora_pl.training.internals import foreach_copy_

T = TypeVar("T")


def processes() -> int:
    """How many processes train together; one where ``torch.distributed`` is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def this_process() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if processes() > 1 else 0


def decides() -> bool:
    """Whether this process is the one whose decisions count."""
    return this_process() == 0


def gathered(value: T) -> list[T]:
    """The values of all processes, in the order of their numbers; every process must call this."""
    values = [value] * processes()
    if processes() > 1:
        dist.all_gather_object(values, value)
    return values


def broadcast_packed(tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors in place with those of rank 0, all of them in one message.

    Args:
        tensors: Of any dtypes and shapes, on one device; every process passes the same dtypes and shapes.

    Example:
        >>> broadcast_packed([torch.zeros(3)])  # one process: nothing happens
    """
    if processes() == 1:
        return
    as_bytes = [tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors]
    message = torch.cat(as_bytes)
    dist.broadcast(message, src=0)
    for tensor, part in zip(tensors, message.split([len(b) for b in as_bytes]), strict=True):
        tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))  # a clone is aligned for any dtype


def average_unsharded(parameters: Iterable[nn.Parameter]) -> None:
    """Average over the processes, in one message, the gradients of the parameters that every process holds whole.

    Args:
        parameters: Some may be sharded or have no gradient, but the same ones in every process.
    """
    gradients = [p.grad for p in parameters if p.grad is not None and not is_sharded(p)]
    if processes() == 1 or not gradients:
        return
    message = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(message)
    parts = (message / processes()).split([gradient.numel() for gradient in gradients])
    foreach_copy_(gradients, [p.view(g.shape) for p, g in zip(parts, gradients, strict=True)])


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of the tensor."""
    return hasattr(tensor, "to_local")  # true of a DTensor, whose import takes a second


def anywhere(flag: Tensor) -> Tensor:
    """Whether a condition, a boolean tensor without dimensions, holds in any process."""
    if processes() == 1:
        return flag
    count = flag.to(torch.int32)
    dist.all_reduce(count)
    return count > 0


def average(values: Sequence[float], device: torch.device) -> list[float]:
    """The averages of some numbers over the processes, in one message.

    Args:
        values: As many in every process.
        device: Where the processes can send from.

    Example:
        >>> average([1.0, 2.0], torch.device("cpu"))  # one process
        [1.0, 2.0]
    """
    if processes() == 1:
        return list(values)
    message = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(message)
    averages: list[float] = (message / processes()).tolist()
    return averages
