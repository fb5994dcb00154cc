"""Data sets of the hub, split by split and column by column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import datasets
import pyarrow as pa

from geolora_pl.data.texts.tables import plain

_USUAL = {"train": "train", "val": "validation", "test": "test"}


def check_split_names(splits: Mapping[str, str] | None) -> None:
    """Refuse names of splits without one to train on.

    Raises:
        ValueError: There is none.
    """
    if splits is not None and "train" not in splits:
        raise ValueError(f"splits={splits!r} must name the split to train on: {{train: ...}}")


def load_hub(
    dataset: str, subset: str | None, splits: Mapping[str, str] | None
) -> dict[str, tuple[str, datasets.Dataset]]:
    """Fetch a data set, or take it from the cache of ``datasets``.

    Args:
        dataset: Its name on the hub, or a folder that ``datasets.load_dataset`` can read.
        subset: Name of the subset, where it has several.
        splits: Its split for each of ours; by default those of the usual names that it has.

    Returns:
        What to call it in messages, and the rows, by our names of the splits.

    Raises:
        ValueError: The data set or a split is not there.
    """
    try:
        hub = datasets.load_dataset(dataset, subset)
    except (OSError, ValueError) as error:  # a failed connection is one of the first
        raise ValueError(f"dataset={dataset!r}, subset={subset!r} cannot be loaded: {error}") from error
    names = splits or {ours: theirs for ours, theirs in _USUAL.items() if theirs in hub or ours == "train"}
    if absent := [theirs for theirs in names.values() if theirs not in hub]:
        raise ValueError(f"{dataset} has no split {absent[0]!r}; it has {', '.join(hub)}: set splits")
    return {ours: (f"{dataset} {theirs}", hub[theirs]) for ours, theirs in names.items()}


def select(texts: datasets.Dataset, columns: Sequence[str], source: str) -> pa.Table:
    """Some columns as a table of plain values.

    Raises:
        ValueError: A column is not there or not plain.
    """
    if absent := [name for name in columns if name not in texts.column_names]:
        raise ValueError(f"{source} has no column {absent[0]!r}; it has {', '.join(texts.column_names)}")
    return plain(texts.select_columns(list(columns)).with_format("arrow")[:], source)
