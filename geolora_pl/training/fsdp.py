"""FSDP2: the base sharded over the processes, the adapters whole in each of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from geolora_pl.adapters.base import FACTORS
from geolora_pl.adapters.inject import find_adapters
from geolora_pl.training.distributed import broadcast_packed, is_sharded


def shard_model(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a model with adapters by FSDP2, in place: the blocks one by one, then the rest.

    The factors stay whole and equal in every process, for a retraction needs all of them. All parameters that are
    trained start from the values of rank 0. FSDP does not reduce the gradients of the factors; the callback does.

    Args:
        model: A model with adapters; its blocks are the children of its ``nn.ModuleList`` and ``nn.Sequential``.
        mesh: The mesh of Lightning, with the dimensions ``data_parallel`` and ``tensor_parallel``.

    Raises:
        ValueError: The mesh divides tensors.
    """
    if (size := mesh["tensor_parallel"].size()) > 1:
        raise ValueError(
            f"tensor_parallel_size={size} would divide the layers that the adapters need whole: set it to 1, and "
            "data_parallel_size to the number of processes"
        )
    factors = {getattr(layer, name) for layer in find_adapters(model).values() for name in FACTORS}
    sent = [p for p in model.parameters() if p in factors or p.requires_grad]
    for parameter in sent:  # the model was built on the CPU, but NCCL sends from a GPU
        parameter.data = parameter.data.to(mesh.device_type)
    with torch.no_grad():
        broadcast_packed(sent)
    data_parallel = mesh["data_parallel"]
    for module in reversed(list(model.modules())):  # blocks inside of blocks first, as FSDP requires
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            for block in module:
                if any(p.numel() for p in block.parameters() if p not in factors):
                    fully_shard(block, mesh=data_parallel, ignored_params=factors)
    fully_shard(model, mesh=data_parallel, ignored_params=factors)


def clip_by_norm(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Clip gradients by their total norm, sharded and whole ones together, of which torch takes only one kind.

    Args:
        parameters: Sharded and whole ones; the gradients of the whole ones are already averaged.
        limit: Greatest norm, above 0.
    """
    having = [p for p in parameters if p.grad is not None]
    if not having:
        return
    kinds = [[p for p in having if is_sharded(p) == sharded] for sharded in (True, False)]
    norms = [get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds if kind]
    total = torch.stack([norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]).norm()
    for kind in kinds:
        clip_grads_with_norm_(kind, limit, total)
