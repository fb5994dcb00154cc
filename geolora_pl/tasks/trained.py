"""Say what a task adapts, and what it trains in full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from geolora_pl.adapters.base import GeoLoRALayer
from geolora_pl.notes import note


def note_adapted(adapters: Mapping[str, GeoLoRALayer]) -> None:
    """Tell the user which layers ``target_modules: auto`` has taken."""
    names = list(adapters)
    if all(layer.is_linear for layer in adapters.values()):
        note(f"target_modules=auto: {len(names)} linear layers are adapted, {names[0]} to {names[-1]}")
    else:
        note(
            f"target_modules=auto: {len(names)} convolutions are adapted, {names[0]} to {names[-1]}, because the model "
            "has no linear layer but its head"
        )


def note_trained_in_full(model: nn.Module, names: Sequence[str]) -> None:
    """Tell the user which modules of a model are trained in full, with their numbers of parameters."""
    sizes = {name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in names}
    if sizes:
        note("trained in full beside the adapters: " + ", ".join(f"{name} ({size:,})" for name, size in sizes.items()))
