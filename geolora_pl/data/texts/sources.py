"""Read your own texts from CSV, TSV, JSON lines or Parquet files, or from a data set of the hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from geolora_pl.data.texts.hub import check_split_names, load_hub, select
from geolora_pl.data.texts.labelled import TextDataModule
from geolora_pl.data.texts.labels import as_strings, to_dataset
from geolora_pl.data.texts.tables import read_table
from geolora_pl.notes import keep_notes, note


class LabelledTexts(TextDataModule):
    """The base of the sources whose columns the user names: a subclass reads tables.

    Labels that are words or whole numbers are classes. Numbers with decimals are the targets of a regression, and so
    are whole numbers with ``regression=True``.

    Args:
        text_column: The column of texts.
        pair_column: The column of the second texts, for pairs.
        label_column: The column of labels.
        labels: The labels in the order of the class indices, as strings, which YAML takes ``no`` and ``yes`` for in
            quotes only; by default those of the training texts, sorted.
        regression: Whether the labels are numbers to predict; by default they are if they have decimals.
        **kwargs: Arguments of :class:`TextDataModule`.

    Raises:
        ValueError: ``labels`` holds a label twice or one that is not a string, or is given for a regression, or two
            columns have the same name.
    """

    def __init__(
        self,
        text_column: str = "text",
        pair_column: str | None = None,
        label_column: str = "label",
        labels: list[str] | None = None,
        regression: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
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
        self.text_columns = [text_column] if pair_column is None else [text_column, pair_column]
        if len({*self.text_columns, label_column}) <= len(self.text_columns):
            raise ValueError(
                f"text_column={text_column!r}, pair_column={pair_column!r} and label_column={label_column!r} must be "
                "different columns"
            )
        self.label_column = label_column
        self.regression = regression
        self._labels = labels

    def read(self) -> Mapping[str, tuple[object, pa.Table]]:
        """Read the tables: for each split, its name for messages and its rows; only ``predict`` has no labels."""
        raise NotImplementedError(f"{type(self).__name__} must read its tables")

    @property
    def class_names(self) -> list[str]:
        """The labels, in the order of their indices; none in a regression."""
        if self._labels is None:
            with keep_notes(self.notes):
                self.load_splits()
        assert self._labels is not None
        return self._labels

    def load_splits(self) -> dict[str, datasets.Dataset]:
        """Read the tables and map the labels of every split in the same way as those of ``train``."""
        tables = self.read()
        if self._labels is None:
            source, table = tables["train"]
            self._labels = _find_labels(table[self.label_column], self.regression)
            if not self._labels and self.regression is None:
                note(
                    f"{source}: {self.label_column} holds numbers with decimals, so this is a regression; set "
                    "regression: false to make each of them a class"
                )
            if len(self._labels) == 1:
                raise ValueError(
                    f"{source}: every {self.label_column} is {self._labels[0]!r}: there must be two classes"
                )
        classes = {label: label for label in self._labels}
        return {
            split: to_dataset(
                table, self.text_columns, None if split == "predict" else self.label_column, classes, source
            )
            for split, (source, table) in tables.items()
        }


class TextFiles(LabelledTexts):
    r"""Texts with labels from files: ``.csv``, ``.tsv`` (in which quotes are data), ``.jsonl`` or ``.parquet``.

    Args:
        train_file: The training texts.
        val_file: The validation texts; by default a part of the training texts is held out.
        test_file: The test texts.
        predict_file: Texts to predict, which need no labels; by default the test texts.
        **kwargs: Arguments of :class:`LabelledTexts`.

    Raises:
        ValueError: A file is missing, empty, broken or of another kind, a column does not exist, or a text or label in
            it is missing or unknown.

    Example:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp(), "reviews.csv")
        >>> _ = file.write_text('review,verdict\n"good, really",yes\nbad,no\n')
        >>> data = TextFiles(str(file), text_column="review", label_column="verdict")
        >>> data.load_splits()["train"][0], data.class_names
        ({'text': 'good, really', 'label': 1}, ['no', 'yes'])
    """

    def __init__(
        self,
        train_file: str,
        val_file: str | None = None,
        test_file: str | None = None,
        predict_file: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        files = {"train": train_file, "val": val_file, "test": test_file, "predict": predict_file}
        self.files = {split: file for split, file in files.items() if file is not None}

    def read(self) -> Mapping[str, tuple[object, pa.Table]]:
        """Read the files."""
        labelled = [*self.text_columns, self.label_column]
        return {
            split: (file, read_table(file, self.text_columns if split == "predict" else labelled))
            for split, file in self.files.items()
        }


class TextHub(LabelledTexts):
    """Texts with labels from a data set of the hub, or a folder that ``datasets.load_dataset`` can read.

    Args:
        dataset: The name of the data set, or the folder.
        subset: The name of the subset, if there are several.
        splits: The name in the data set for each of our splits, such as ``{train: train, val: validation}``; by default
            those of the usual names ``train``, ``validation`` and ``test`` that exist.
        **kwargs: Arguments of :class:`LabelledTexts`.

    Raises:
        ValueError: The data set, a split or a column does not exist, or a text or label is missing or unknown.
    """

    def __init__(
        self, dataset: str, subset: str | None = None, splits: dict[str, str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check_split_names(splits)
        self.dataset = dataset
        self.subset = subset
        self.named_splits = splits

    def read(self) -> Mapping[str, tuple[object, pa.Table]]:
        """Fetch the data set, or take it from the cache of ``datasets``."""
        tables: dict[str, tuple[object, pa.Table]] = {}
        for ours, (source, texts) in load_hub(self.dataset, self.subset, self.named_splits).items():
            table = self._table(texts, ours, source)
            if ours == "test" and set(pc.unique(table[-1]).to_pylist()) <= {None, -1}:  # its labels are hidden
                tables["predict"] = (source, table.select(self.text_columns))
            else:
                tables[ours] = (source, table)
        return tables

    def _table(self, texts: datasets.Dataset, split: str, source: str) -> pa.Table:
        columns = self.text_columns if split == "predict" else [*self.text_columns, self.label_column]
        table = select(texts, columns, source)
        feature = texts.features[columns[-1]]
        if self.regression or not isinstance(feature, datasets.ClassLabel):
            return table
        self._labels = self._labels or list(feature.names)
        indices = table[-1]
        known = pc.if_else(pc.greater_equal(indices, 0), indices, None)  # -1 stands for an unknown label
        return table.set_column(len(columns) - 1, columns[-1], pc.take(pa.array(feature.names), known))


def _find_labels(column: pa.ChunkedArray, regression: bool | None) -> list[str]:
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
