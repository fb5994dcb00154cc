"""Steps on the coefficients alone: increments that stay inside of the bases of both sides."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from geolora_pl.adapters.base import GeoLoRALayer


@torch.no_grad()
def restrict_gradients(layers: Iterable[GeoLoRALayer]) -> None:
    """Leave of the gradients what moves S alone: ``U U^T G V`` for K, and nothing for L."""
    for layer in layers:
        if layer.K.grad is not None:
            layer.K.grad.copy_(layer.U @ (layer.U.mT @ layer.K.grad))
        if layer.L.grad is not None:
            layer.L.grad.zero_()


@torch.no_grad()
def restrict_increments(layers: Iterable[GeoLoRALayer]) -> None:
    """Take out of K and L what the optimizer's momentum and scaling have put outside of the bases."""
    for layer in layers:
        layer.K.copy_(layer.U @ (layer.U.mT @ layer.K))
        layer.L.zero_()
