"""Turn the columns of a table into texts and labels as every text source gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from geolora_pl.data.labels import LabelColumns, class_indices, finite_numbers
from geolora_pl.notes import note


def to_dataset(
    table: pa.Table, texts: Sequence[str], label: str | None, classes: Mapping[str, str], source: object
) -> datasets.Dataset:
    """Name the columns ``text``, ``text_pair`` and ``label``, and turn labels into class indices or numbers.

    A missing text becomes an empty text, because CSV cannot tell them apart; a message says how many there are.

    Args:
        table: The table.
        texts: The column of texts, or both columns of a pair.
        label: The column of labels, or ``None`` if there is none.
        classes: The name of the class by label, in the order of the indices; none for a regression.
        source: The name of the table in messages.

    Returns:
        The data set; ``label`` is a ``ClassLabel`` or a float.

    Raises:
        ValueError: A label is missing or unknown; the message names its row, counted from 1.

    Example:
        >>> table = pa.table({"review": ["good", "bad"], "stars": ["5", "1"]})
        >>> to_dataset(table, ["review"], "stars", {"1": "negative", "5": "positive"}, "reviews.csv")["label"][:]
        [1, 0]
    """
    columns = {}
    for name, column in zip(("text", "text_pair"), texts, strict=False):
        columns[name] = table[column].cast(pa.string()).fill_null("")
        empty = pc.equal(columns[name], "")
        if count := pc.sum(empty).as_py():
            note(f"{source}: {column} is empty in {count} rows, row {pc.index(empty, True).as_py() + 1} first")
    features = {name: datasets.Value("string") for name in columns}
    if label is not None and classes:
        columns["label"] = class_indices(table[label], classes, source, label)
        features["label"] = datasets.ClassLabel(names=list(classes.values()))
    elif label is not None:
        columns["label"] = finite_numbers(table[label], source, label)
        features["label"] = datasets.Value("float32")
    return datasets.Dataset(pa.table(columns), info=datasets.DatasetInfo(features=datasets.Features(features)))


def with_several_labels(
    table: pa.Table, texts: Sequence[str], labels: LabelColumns, source: object
) -> datasets.Dataset:
    """Name the columns as :func:`to_dataset` does; ``label`` is 0 or 1 for each of several labels, as floats.

    Args:
        table: The table.
        texts: The column of texts, or both columns of a pair.
        labels: Where the table has its labels.
        source: The name of the table in messages.

    Raises:
        ValueError: A label is unknown; the message names its row, counted from 1.
    """
    found = labels.several(table, source)
    kind = datasets.Sequence(datasets.Value("float32"), length=found.shape[1])
    dataset = to_dataset(table, texts, None, {}, source)
    return dataset.add_column("label", found.tolist(), feature=kind)
