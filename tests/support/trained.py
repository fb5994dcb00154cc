"""An adapter that training has moved."""

import torch

from geolora_pl import GeoLoRALinear


def trained(layer: GeoLoRALinear) -> GeoLoRALinear:
    """An adapter in the middle of training: S, K and L are not zero, neither those of the probes."""
    r, w = layer.rank, layer.probes + layer.rank
    with torch.no_grad():
        layer.S[:r, :r] = torch.diag(torch.rand(r))
        layer.K[:, :w].normal_()
        layer.L[:, :w].normal_()
    return layer
