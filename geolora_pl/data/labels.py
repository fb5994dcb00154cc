"""Turn the columns of labels of a table into class indices, into numbers, or into several labels per row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from geolora_pl.notes import note


class LabelColumns:
    """Where a table has its labels, and what they are: one class per row, a number, or any number of labels.

    Labels that are words or whole numbers are classes. Numbers with decimals are the targets of a regression, and so
    are whole numbers with ``regression=True``. With ``label_separator`` or ``label_columns`` a row may have several
    labels or none.

    Attributes:
        names: The labels in the order of their indices; none in a regression; ``None`` before :meth:`settle`.

    Args:
        label_column: The column of labels.
        labels: The labels in the order of their indices, as strings; by default those of the training rows, sorted.
        regression: Whether the labels are numbers to predict; by default they are if they have decimals.
        label_separator: What stands between the labels of one row in ``label_column``.
        label_columns: A column of 0 and 1 for each label, instead of ``label_column``.

    Raises:
        ValueError: The settings do not go together, or ``labels`` holds a label twice or one that is not a string.

    Example:
        >>> columns = LabelColumns(label_separator="|")
        >>> table = pa.table({"label": ["red|round", "", "round"]})
        >>> columns.settle(table, "things.csv")
        >>> columns.names, columns.several(table, "things.csv").tolist()
        (['red', 'round'], [[1.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
    """

    def __init__(
        self,
        label_column: str = "label",
        labels: list[str] | None = None,
        regression: bool | None = None,
        label_separator: str | None = None,
        label_columns: list[str] | None = None,
    ) -> None:
        given: list[Any] = labels or []
        if words := [label for label in given if isinstance(label, bool)]:
            raise ValueError(
                f"labels={labels!r}: YAML reads no, yes, on, off, true and false without quotes as {words[0]!r}: put "
                "them into quotes, as in ['no', 'yes']"
            )
        if labels is not None and (
            regression or len(set(labels)) < max(2, len(labels)) or not all(isinstance(name, str) for name in labels)
        ):
            raise ValueError(
                f"labels={labels!r} must name two or more classes as strings, each once, and none in a regression"
            )
        if label_separator == "":
            raise ValueError(
                "label_separator='' separates nothing: give the characters between two labels, such as '|'"
            )
        if label_columns is not None and len(set(label_columns)) < max(2, len(label_columns)):
            raise ValueError(f"label_columns={label_columns!r} must name two or more columns, each once")
        if label_columns is not None and (labels is not None or label_separator is not None):
            raise ValueError(
                f"label_columns={label_columns!r} name the labels, one per column: leave labels and label_separator out"
            )
        self.label_column = label_column
        self.regression = regression
        self.separator = label_separator
        self.label_columns = label_columns
        self.multi_label = label_columns is not None or label_separator is not None
        if self.multi_label and regression:
            raise ValueError("regression=True predicts one number: leave label_separator and label_columns out")
        self.names = labels or label_columns

    @property
    def columns(self) -> list[str]:
        """The columns that hold labels."""
        return self.label_columns or [self.label_column]

    def settle(self, table: pa.Table, source: object) -> None:
        """Take the labels from the training rows, unless they were given.

        Raises:
            ValueError: There is only one label, or none.
        """
        if self.names is not None:
            return
        column = table[self.label_column]
        if self.separator is not None:
            self.names = sorted({label for labels in self._split(column) for label in labels})
        else:
            if not pc.any(pc.not_equal(as_strings(column), "")).as_py():
                raise ValueError(f"{source}: {self.label_column} is empty in every row: name another column")
            self.names = find_labels(column, self.regression)
            if not self.names and self.regression is None:
                note(
                    f"{source}: {self.label_column} holds numbers with decimals, so this is a regression; set "
                    "regression: false to make each of them a class"
                )
        if self.multi_label and len(self.names) < 2:
            found = f"the label {self.names[0]!r} alone" if self.names else "no label"
            raise ValueError(f"{source}: {self.label_column} holds {found}: there must be two labels")
        if len(self.names) == 1:
            raise ValueError(f"{source}: every {self.label_column} is {self.names[0]!r}: there must be two classes")

    def _split(self, column: pa.ChunkedArray) -> list[list[str]]:
        cells = as_strings(column).fill_null("").to_pylist()
        return [[label for part in cell.split(self.separator) if (label := part.strip())] for cell in cells]

    def several(self, table: pa.Table, source: object) -> npt.NDArray[np.float32]:
        """The labels of every row as 0 and 1 (rows, labels), once they are settled.

        Raises:
            ValueError: A label is unknown, or a cell of ``label_columns`` neither 0 nor 1; the message names the row.
        """
        names = self.names or []
        if self.label_columns is not None:
            return np.stack([_zeros_and_ones(table[name], source, name) for name in names], axis=1)
        places = {name: index for index, name in enumerate(names)}
        found = np.zeros((len(table), len(names)), np.float32)
        for row, labels in enumerate(self._split(table[self.label_column])):
            for label in labels:
                if label not in places:
                    raise ValueError(
                        f"{source}: row {row + 1} has the label {label!r} in {self.label_column}, which is none of "
                        f"{', '.join(names)}: fix the row, or name all labels"
                    )
                found[row, places[label]] = 1
        return found

    def single(self, table: pa.Table, source: object) -> npt.NDArray[Any]:
        """The class index, int64, or the number, float32, of every row (rows,), once the labels are settled.

        Raises:
            ValueError: A label is missing or unknown; the message names its row, counted from 1.
        """
        column = table[self.label_column]
        if self.names:
            classes = {name: name for name in self.names}
            return class_indices(column, classes, source, self.label_column).to_numpy()  # type: ignore[no-any-return]
        return finite_numbers(column, source, self.label_column).to_numpy()  # type: ignore[no-any-return]


def class_indices(
    column: pa.Array | pa.ChunkedArray, classes: Mapping[str, str], source: object, name: str
) -> pa.ChunkedArray:
    """The class index of every label, int64.

    Args:
        column: The labels.
        classes: The name of the class by label, in the order of the indices.
        source: The name of the table in messages.
        name: That of the column.

    Raises:
        ValueError: A label is missing or unknown; the message names its row, counted from 1.
    """
    indices = pc.index_in(as_strings(column), value_set=as_strings(pa.array(list(classes))))
    why = f"is none of the labels {', '.join(classes)}: fix the row, or name all labels"
    _refuse(column, indices.is_null(), source, name, why)
    return indices.cast(pa.int64())


def finite_numbers(column: pa.ChunkedArray, source: object, name: str) -> pa.ChunkedArray:
    """The labels as numbers, float32.

    Raises:
        ValueError: One of them is not a finite number; the message names its row, counted from 1.
    """
    numbers = as_numbers(column).cast(pa.float32(), safe=False)
    finite = pc.fill_null(pc.is_finite(numbers), False)
    _refuse(column, pc.invert(finite), source, name, "is not a finite number of 32 bits: fix the row")
    return numbers


def _zeros_and_ones(column: pa.ChunkedArray, source: object, name: str) -> npt.NDArray[np.float32]:
    numbers = as_numbers(column)
    known = pc.fill_null(pc.is_in(numbers, value_set=pa.array([0.0, 1.0])), False)
    _refuse(column, pc.invert(known), source, name, "is neither 0 nor 1: fix the row")
    return numbers.cast(pa.float32()).to_numpy()  # type: ignore[no-any-return]


def as_strings(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Return labels as the strings that are mapped to classes: both 1 and ``" 1 "`` become ``"1"``."""
    return pc.utf8_trim_whitespace(column.cast(pa.string()))


def as_numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return labels as numbers, and null for a label that is not a number."""
    try:
        return column.cast(pa.float64())
    except pa.ArrowInvalid:
        return pa.chunked_array([[_number(value) for value in column.to_pylist()]], pa.float64())


def find_labels(column: pa.ChunkedArray, regression: bool | None) -> list[str]:
    """Return the classes, sorted, numbers by their value; none for a regression."""
    words = pc.unique(as_strings(column.drop_null()))
    words = words.filter(pc.not_equal(words, ""))
    numbers = _cast(words, pa.float64())
    decimals = pa.types.is_floating(column.type) or _cast(words, pa.int64()) is None
    if regression or (regression is None and numbers is not None and decimals):
        return []
    names: list[str] = words.take(pc.sort_indices(words if numbers is None else numbers)).to_pylist()
    return names


def _cast(values: pa.Array, kind: pa.DataType) -> pa.Array | None:
    try:
        return values.cast(kind)
    except pa.ArrowInvalid:
        return None


def _number(value: str) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _refuse(column: pa.ChunkedArray, wrong: pa.ChunkedArray, source: object, name: str, why: str) -> None:
    row = pc.index(wrong, True).as_py()
    if row >= 0:
        raise ValueError(f"{source}: row {row + 1} has {name}={column[row].as_py()!r}, which {why}")
