"""From the columns of a table to texts and labels as every text source gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import datasets
import pyarrow as pa
import pyarrow.compute as pc


def to_dataset(
    table: pa.Table, texts: Sequence[str], label: str | None, classes: Mapping[str, str], source: object
) -> datasets.Dataset:
    """Name the columns ``text``, ``text_pair`` and ``label``, and turn labels into class indices or numbers.

    Args:
        table: What was read.
        texts: Its column of texts, or both of a pair.
        label: Its column of labels, or ``None`` where there are none.
        classes: Name of the class by label, in the order of the indices; none for a regression.
        source: Where the table comes from, for messages.

    Returns:
        The data set; ``label`` is a ``ClassLabel`` or a float.

    Raises:
        ValueError: A text is missing, or a label is missing or unknown; the row is named, the first one is 1.

    Example:
        >>> table = pa.table({"review": ["good", "bad"], "stars": ["5", "1"]})
        >>> to_dataset(table, ["review"], "stars", {"1": "negative", "5": "positive"}, "reviews.csv")["label"][:]
        [1, 0]
    """
    columns = {}
    for name, column in zip(("text", "text_pair"), texts, strict=False):
        if table[column].null_count:
            row = pc.index(table[column].is_null(), True).as_py()
            raise ValueError(f"{source}: row {row + 1} has no {column!r}: leave the row out, or fill it")
        columns[name] = table[column].cast(pa.string())
    features = {name: datasets.Value("string") for name in columns}
    if label is not None and classes:
        columns["label"] = _indices(table[label], classes, f"{source}: row {{}} has {label}={{!r}}")
        features["label"] = datasets.ClassLabel(names=list(classes.values()))
    elif label is not None:
        columns["label"] = _numbers(table[label], f"{source}: row {{}} has {label}={{!r}}")
        features["label"] = datasets.Value("float32")
    return datasets.Dataset(pa.table(columns), info=datasets.DatasetInfo(features=datasets.Features(features)))


def as_strings(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Labels as the words by which they are mapped to classes: the number 1 is ``"1"``."""
    return column.cast(pa.string())


def _indices(column: pa.ChunkedArray, classes: Mapping[str, str], message: str) -> pa.ChunkedArray:
    indices = pc.index_in(as_strings(column), value_set=pa.array(list(classes), pa.string()))
    if indices.null_count:
        row = pc.index(indices.is_null(), True).as_py()
        raise ValueError(
            f"{message.format(row + 1, column[row].as_py())}, which is none of the labels {', '.join(classes)}: mend "
            "the row, or name all labels"
        )
    return indices.cast(pa.int64())


def _numbers(column: pa.ChunkedArray, message: str) -> pa.ChunkedArray:
    try:
        numbers = column.cast(pa.float64())
    except pa.ArrowInvalid:  # says what is no number, but not where
        numbers = pa.chunked_array([[_number(value) for value in column.to_pylist()]], pa.float64())
    wrong = pc.invert(pc.fill_null(pc.is_finite(numbers), False))
    row = pc.index(wrong, True).as_py()
    if row >= 0:
        raise ValueError(f"{message.format(row + 1, column[row].as_py())}, which is no finite number: mend the row")
    return numbers.cast(pa.float32(), safe=False)


def _number(value: str) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
