"""Write the weights of a plain model, whatever their layout, and whatever shares them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn


def write_weights(model: nn.Module, path: str | Path) -> None:
    """Write a model's state dict as a safetensors file, under all names that a weight has.

    The format knows neither layouts nor sharing: every tensor is written as a contiguous one of its own, so that
    ``model.load_state_dict`` takes the file, and a weight that is shared is shared again then.

    Args:
        model: A model without adapters.
        path: The file.
    """
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, path, {"format": "pt"})
