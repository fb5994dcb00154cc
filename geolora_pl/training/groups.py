"""The parameter groups of an optimizer of adapters, and what RiemannianAdam asks of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

from torch import Tensor, nn

from geolora_pl.adapters.base import adapter_of

Geometry = Literal["rowwise", "isotropic", "spectral", "entrywise"]


def parameter_groups(model: nn.Module | Iterable[nn.Parameter], head_lr: float | None = 1e-3) -> list[dict[str, Any]]:
    """Split what is trained into adapters, other matrices and other vectors.

    The groups suit any torch optimizer. Adapters come first, K and L of one adapter side by side, marked with
    ``adapters: True`` for :class:`RiemannianAdam`. Biases and norms get ``weight_decay: 0``. The names ``adapters``,
    ``in_full`` and ``no_decay`` are those under which learning rates are logged.

    Args:
        model: A model with adapters, or parameters of such a model; those that need no gradient are left out.
        head_lr: Learning rate, above 0, of everything but the adapters; ``None`` means the optimizer's own.

    Returns:
        One to three groups, none of them empty.

    Example:
        >>> from geolora_pl import AdapterConfig, inject_adapters
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
        >>> _ = inject_adapters(model, AdapterConfig(target_modules=["0"], modules_to_save=["1"]))
        >>> [len(group["params"]) for group in parameter_groups(model)]
        [2, 1, 1]
    """
    parameters = model.parameters() if isinstance(model, nn.Module) else model
    trained = [p for p in parameters if p.requires_grad]
    layers = [layer for p in trained if (layer := adapter_of(p)) is not None and p is layer.K]
    factors = [factor for layer in layers for factor in (layer.K, layer.L)]
    of_adapters = {id(p) for p in factors}
    rest = [p for p in trained if id(p) not in of_adapters]
    lr = {} if head_lr is None else {"lr": head_lr}
    groups: list[dict[str, Any]] = [
        {"params": factors, "adapters": True, "name": "adapters"},
        {"params": [p for p in rest if p.dim() > 1], "name": "in_full", **lr},
        {"params": [p for p in rest if p.dim() <= 1], "name": "no_decay", "weight_decay": 0.0, **lr},
    ]
    return [group for group in groups if group["params"]]


def check_group(group: dict[str, Any]) -> None:
    """Raise a ValueError if a setting of a group of RiemannianAdam is out of range, or its K and L are not in pairs."""
    if not group["lr"] >= 0:
        raise ValueError(f"lr={group['lr']!r} must be at least 0")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas={group['betas']!r} must lie in [0, 1)")
    if not group["eps"] > 0:
        raise ValueError(f"eps={group['eps']!r} must be above 0")
    if not group["weight_decay"] >= 0:
        raise ValueError(f"weight_decay={group['weight_decay']!r} must be at least 0")
    if group["geometry"] not in get_args(Geometry):
        raise ValueError(f"geometry={group['geometry']!r} must be one of {', '.join(get_args(Geometry))}")
    if group["adapters"] and not _are_pairs(group["params"]):
        raise ValueError(
            "a group with adapters=True must hold K and L of each adapter side by side, K first: take the groups of "
            "parameter_groups(model)"
        )


def _are_pairs(factors: Sequence[Tensor]) -> bool:
    """Whether K and L of each adapter follow one another; of tensors without an adapter only their number counts."""
    owners = [adapter_of(factor) for factor in factors]
    return len(factors) % 2 == 0 and all(
        K_owner is L_owner and (K_owner is None or K is K_owner.K)
        for K, K_owner, L_owner in zip(factors[::2], owners[::2], owners[1::2], strict=True)
    )
