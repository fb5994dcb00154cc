"""Find the weights that bitsandbytes or torchao has quantised, and make them plain."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from geolora_pl.adapters.config import AdapterConfig
from geolora_pl.adapters.kinds import GeoLoRALinear
from geolora_pl.adapters.targets import replace_layers

_LEAST = AdapterConfig(init_rank=1, max_rank=1, probes=0)


def quantised_names(model: nn.Module) -> list[str]:
    """All names of the parameters that hold codes, such as 4-bit integers, in place of the numbers of a weight.

    The state dict of a model with such parameters cannot be loaded: it has entries of which torch knows nothing
    (bitsandbytes), or tensors of a class of their own (torchao).

    Example:
        >>> quantised_names(nn.Sequential(nn.Linear(4, 4)))
        []
    """
    return [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if type(parameter).dequantize is not Tensor.dequantize or _is_packed(parameter)
    ]


def _is_packed(parameter: Tensor) -> bool:
    """Whether a parameter is of integers and of a class of its own; a plain one is what the user means."""
    is_whole = not (parameter.is_floating_point() or parameter.is_complex())
    return is_whole and type(parameter) is not nn.Parameter


def quantised_sizes(model: nn.Module) -> dict[int, int]:
    """How many numbers the quantised weight of each linear layer stands for, by the identity of the weight.

    Two of 4 bits may be stored as one of 8.
    """
    return {
        id(getattr(layer, "weight", None)): layer.out_features * layer.in_features for layer in _quantised_layers(model)
    }


def _quantised_layers(model: nn.Module) -> list[nn.Linear]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear) and GeoLoRALinear.is_quantised(layer)]


def loadable_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model without what quantised layers write beside their weights, such as scales.

    Torch does not load that. It belongs to the layers and never changes, so that nothing is lost.

    Example:
        >>> list(loadable_state(nn.Linear(4, 4)))
        ['weight', 'bias']
    """
    state: dict[str, Tensor] = model.state_dict()
    if not quantised_names(model):
        return state
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    return {name: value for name, value in state.items() if name in known or name.endswith("_extra_state")}


def keep_trainable(model: nn.Module) -> None:
    """Keep the 4-bit layers of bitsandbytes from a form of their weights for evaluation that training cannot use.

    On a CPU with instructions for bfloat16 they take it at the first evaluation, do not leave it in training, and then
    have no gradient.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # no tensor and no module


@torch.no_grad()
def dequantise(model: nn.Module) -> None:
    """Replace every quantised linear layer of a model without adapters by a plain one, in place.

    Args:
        model: The model; each new weight is what its layer has computed with.
    """
    around = (GeoLoRALinear(layer, _LEAST) for layer in _quantised_layers(model))
    replace_layers(model, ((adapter.base, adapter.plain(adapter.base_weight())) for adapter in around))
