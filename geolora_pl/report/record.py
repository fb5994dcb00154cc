"""What identifies a run, as a file in its folder: a fit writes it, a report reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

from geolora_pl.storage.atomic import atomic

NAME = "run.json"
VERSION, BETTER = "version.", "better."  # and the name of a package, or of a metric that chooses checkpoints
_LARGEST = 100_000  # bytes
_MOST = 2**62

Record = Mapping[str, str | int | float]


def write_record(folder: Path, record: Record) -> None:
    """Write the record of a run, over that of an earlier one.

    Args:
        folder: That of the run.
        record: Plain values by name.
    """
    with atomic(folder / NAME) as unfinished:
        unfinished.write_text(json.dumps(record, indent=1), encoding="utf-8")


def read_record(folder: Path) -> Record:
    """The record of a run; empty if there is none, and without what is no text or number that makes sense."""
    path = folder / NAME
    if not path.is_file() or path.stat().st_size > _LARGEST:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return {}
    kept = found.items() if isinstance(found, dict) else ()
    return {name: value for name, value in kept if isinstance(value, str) or is_number(value)}


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value from a file is a number that can be calculated with."""
    return isinstance(value, (int, float)) and abs(value) < _MOST
