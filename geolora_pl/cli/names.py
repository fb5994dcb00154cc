"""Classes of this package by their names alone: ``class_path: ImageFolder``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module


@cache
def homes() -> Mapping[str, str]:
    """Every task and data source, and the package that imports it at its first use."""
    packages = ("geolora_pl.tasks", "geolora_pl.data")  # by their paths, as they stand in the YAML of users
    return {name: package for package in packages for name in import_module(package).__all__}


def import_by_name(name: str) -> None:
    """Import the task or data source of a name, so that the command line, which knows what is imported, finds it.

    Args:
        name: A name, or anything else.
    """
    if name in homes():
        getattr(import_module(homes()[name]), name)
