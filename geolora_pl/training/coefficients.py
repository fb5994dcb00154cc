"""Steps on the coefficients alone: increments that stay inside of the bases of both sides."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from geolora_pl.adapters.base import GeoLoRALayer
from geolora_pl.math.precision import exact_products


@torch.no_grad()
def restrict_gradients(layers: Iterable[GeoLoRALayer]) -> None:
    """Leave of the gradients what moves S alone: ``U U^T G V`` for K, and nothing for L."""
    for layer in layers:
        if layer.K.grad is not None:
            layer.K.grad.copy_(_in_span(layer, layer.K.grad))
        if layer.L.grad is not None:
            layer.L.grad.zero_()


@torch.no_grad()
def restrict_increments(layers: Iterable[GeoLoRALayer]) -> None:
    """Take out of K and L what the optimizer's momentum and scaling have put outside of the bases."""
    for layer in layers:
        layer.K.copy_(_in_span(layer, layer.K))
        layer.L.zero_()


def _in_span(layer: GeoLoRALayer, columns: Tensor) -> Tensor:
    """The part of (m, R) in the span of U, not rounded to the type of an autocast around the step."""
    with exact_products(layer.U.device):
        return layer.U @ (layer.U.mT @ columns)
