"""Load data sets of the hub, by splits and columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetGenerationError, DatasetsError

from geolora_pl.data.settings import find_splits
from geolora_pl.data.texts.tables import plain
from geolora_pl.notes import note


def check_split_names(splits: Mapping[str, str] | None) -> None:
    """Refuse names of splits if the split to train on is missing.

    Raises:
        ValueError: ``train`` is missing.
    """
    if splits is not None and "train" not in splits:
        raise ValueError(f"splits={splits!r} must name the split to train on: {{train: ...}}")


def fetch(dataset: str, subset: str | None) -> datasets.DatasetDict:
    """Fetch a data set, or take it from the cache of ``datasets``.

    Args:
        dataset: The name of the data set on the hub, or a folder that ``datasets.load_dataset`` can read.
        subset: The name of the subset, if there are several.

    Raises:
        ValueError: The data set does not exist, or cannot be read.
    """
    try:
        return datasets.load_dataset(dataset, subset)
    except (DatasetsError, OSError, ValueError) as error:  # a failed connection is an OSError
        reason = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        raise ValueError(f"dataset={dataset!r}, subset={subset!r} cannot be loaded: {reason}") from error


def load_hub(
    dataset: str, subset: str | None, splits: Mapping[str, str] | None
) -> dict[str, tuple[str, datasets.Dataset]]:
    """Fetch a data set, or take it from the cache of ``datasets``.

    Args:
        dataset: The name of the data set on the hub, or a folder that ``datasets.load_dataset`` can read.
        subset: The name of the subset, if there are several.
        splits: The name in the data set for each of our splits; by default the usual names that the data set has.

    Returns:
        For each of our splits, its name for messages and its rows.

    Raises:
        ValueError: The data set or a split does not exist.
    """
    hub = fetch(dataset, subset)
    names = splits or {"train": "train", **find_splits(list(hub), dataset)}
    if absent := [theirs for theirs in names.values() if theirs not in hub]:
        raise ValueError(f"{dataset} has no split {absent[0]!r}; it has {', '.join(hub)}: set splits")
    if splits is None and (unused := [theirs for theirs in hub if theirs not in names.values()]):
        note(f"{dataset}: splits that are not used: {', '.join(unused)}; name them in splits to use them")
    return {ours: (f"{dataset} {theirs}", hub[theirs]) for ours, theirs in names.items()}


def select(texts: datasets.Dataset, columns: Sequence[str], source: str, *, nested: bool = False) -> pa.Table:
    """Return some columns as a table, of plain values unless they may be nested.

    Raises:
        ValueError: A column does not exist or is not plain.
    """
    if absent := [name for name in columns if name not in texts.column_names]:
        raise ValueError(f"{source} has no column {absent[0]!r}; it has {', '.join(texts.column_names)}")
    table = texts.select_columns(list(columns)).with_format("arrow")[:]
    return table if nested else plain(table, source)
