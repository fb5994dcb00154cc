"""Write the weights of a plain model, whatever their layout, and whatever shares them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


def write_weights(model: nn.Module, path: str | Path) -> None:
    """Write a model's state dict as a safetensors file, under all names that a weight has.

    The format knows neither layouts nor sharing: every tensor is written as a contiguous one of its own, so that
    ``model.load_state_dict`` takes the file, and a weight that is shared is shared again then.

    Args:
        model: A model without adapters.
        path: The file.
    """
    save_file(plain_copies(model.state_dict()), path, {"format": "pt"})


def plain_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that a safetensors file can hold: on the CPU, contiguous, each with memory of its own."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
