"""Check the settings that every data module has, and know the usual names of splits."""

from __future__ import annotations

import os
from collections.abc import Collection


def check_batches(batch_size: int, val_fraction: float) -> None:
    """Raise a ValueError if a setting of batches or of held-out samples is out of range."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction} must lie between 0 and 1, both excluded")


def settle_num_workers(num_workers: int | None) -> int:
    """The number of loader processes: as given, or the number of cores beyond the first two, at most 8.

    Raises:
        ValueError: It is below 0.
    """
    if num_workers is None:
        return min(8, max(0, (os.cpu_count() or 1) - 2))
    if num_workers < 0:
        raise ValueError(f"num_workers={num_workers} must be at least 0")
    return num_workers


# The usual names of our splits; the first one is the name that the pages use.
_USUAL_SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


def find_splits(names: Collection[str], source: object) -> dict[str, str]:
    """Find our splits among the names of folders or of the splits of a data set.

    Args:
        names: What is there.
        source: Where they are, for messages.

    Returns:
        The name there for each of our splits that exists.

    Raises:
        ValueError: Two names stand for one split.

    Example:
        >>> find_splits(["valid", "train", "extra"], "photos")
        {'train': 'train', 'val': 'valid'}
    """
    found: dict[str, str] = {}
    for split, usual in _USUAL_SPLITS.items():
        there = [name for name in names if name.lower() in usual]
        if len(there) > 1:
            raise ValueError(f"{source} has {' and '.join(map(repr, there))}, which both mean {split}: keep one")
        if there:
            found[split] = there[0]
    return found
