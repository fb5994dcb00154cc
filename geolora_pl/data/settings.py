"""Check the settings that every data module has."""

from __future__ import annotations

import os


def settle_num_workers(batch_size: int, val_fraction: float, num_workers: int | None) -> int:
    """Check the settings of splits and loaders, and return the number of loader processes.

    Returns:
        The given number, or the number of cores beyond the first two, at most 8.

    Raises:
        ValueError: A setting is out of range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction} must lie between 0 and 1, both excluded")
    if num_workers is None:
        return min(8, max(0, (os.cpu_count() or 1) - 2))
    if num_workers < 0:
        raise ValueError(f"num_workers={num_workers} must be at least 0")
    return num_workers
