"""Classes by their names alone: ``class_path: ImageFolder``, ``optimizer: AdamW``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module

from lightning.pytorch.cli import ReduceLROnPlateau
from torch import optim


@cache
def homes() -> Mapping[str, str]:
    """Every task, data source and public class, and the package that imports it at its first use."""
    # By their paths, as they stand in the YAML of users.
    packages = ("geolora_pl", "geolora_pl.tasks", "geolora_pl.data")
    return {name: package for package in packages for name in import_module(package).__all__}


def path_of(name: str) -> str:
    """What the command line is to look up for a name; anything else is returned as it is.

    A class of this package is imported, because the command line knows what is imported. An optimizer or schedule of
    torch is found by its path, for other libraries have some of the same name (``AdamW`` of bitsandbytes). Only
    ``ReduceLROnPlateau`` is Lightning's, which knows the metric that it waits for.

    Args:
        name: A name, or anything else.

    Example:
        >>> path_of("AdamW"), path_of("LinearLR"), path_of("mine.AdamW")
        ('torch.optim.AdamW', 'torch.optim.lr_scheduler.LinearLR', 'mine.AdamW')
    """
    if name in homes():
        getattr(import_module(homes()[name]), name)
    if name == ReduceLROnPlateau.__name__:
        return f"{ReduceLROnPlateau.__module__}.{name}"
    for package in (optim, optim.lr_scheduler):
        if name.isidentifier() and isinstance(getattr(package, name, None), type):
            return f"{package.__name__}.{name}"
    return name
