"""Turn the columns of a table into texts and labels as every text source gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import datasets
import pyarrow as pa
import pyarrow.compute as pc

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
        indices = pc.index_in(as_strings(table[label]), value_set=as_strings(pa.array(list(classes))))
        why = f"is none of the labels {', '.join(classes)}: fix the row, or name all labels"
        _refuse(table[label], indices.is_null(), source, label, why)
        columns["label"] = indices.cast(pa.int64())
        features["label"] = datasets.ClassLabel(names=list(classes.values()))
    elif label is not None:
        numbers = as_numbers(table[label])
        finite = pc.fill_null(pc.is_finite(numbers), False)
        _refuse(table[label], pc.invert(finite), source, label, "is not a finite number: fix the row")
        columns["label"] = numbers.cast(pa.float32(), safe=False)
        features["label"] = datasets.Value("float32")
    return datasets.Dataset(pa.table(columns), info=datasets.DatasetInfo(features=datasets.Features(features)))


def as_strings(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Return labels as the strings that are mapped to classes: both 1 and ``" 1 "`` become ``"1"``."""
    return pc.utf8_trim_whitespace(column.cast(pa.string()))


def as_numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return labels as numbers, and null for a label that is not a number."""
    try:
        return column.cast(pa.float64())
    except pa.ArrowInvalid:
        return pa.chunked_array([[_number(value) for value in column.to_pylist()]], pa.float64())


def _number(value: str) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _refuse(column: pa.ChunkedArray, wrong: pa.ChunkedArray, source: object, name: str, why: str) -> None:
    row = pc.index(wrong, True).as_py()
    if row >= 0:
        raise ValueError(f"{source}: row {row + 1} has {name}={column[row].as_py()!r}, which {why}")
