"""Say what a task trains in full beside its adapters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from geolora_pl.notes import note


def note_trained_in_full(model: nn.Module, names: Sequence[str]) -> None:
    """Tell the user which modules of a model are trained in full, with their numbers of parameters."""
    sizes = {name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in names}
    if sizes:
        note("trained in full beside the adapters: " + ", ".join(f"{name} ({size:,})" for name, size in sizes.items()))
