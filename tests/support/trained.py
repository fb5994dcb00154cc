"""An adapter that training has moved."""

import torch

from geolora_pl import GeoLoRALinear


def trained(layer: GeoLoRALinear) -> GeoLoRALinear:
    """An adapter in the middle of training: S, K and L are not zero."""
    r = layer.rank
    with torch.no_grad():
        layer.S[:r, :r] = torch.diag(torch.rand(r))
        layer.K[:, :r].normal_()
        layer.L[:, :r].normal_()
    return layer
