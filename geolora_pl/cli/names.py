"""Classes of this package by their names alone: ``class_path: ImageFolder``."""

from __future__ import annotations

import geolora_pl.data
import geolora_pl.tasks

# Every task and data source, and the package that imports it at its first use.
HOMES = {name: package for package in (geolora_pl.tasks, geolora_pl.data) for name in package.__all__}


def import_by_name(name: str) -> None:
    """Import the task or data source of a name, so that the command line, which knows what is imported, finds it.

    Args:
        name: A name, or anything else.
    """
    if name in HOMES:
        getattr(HOMES[name], name)
