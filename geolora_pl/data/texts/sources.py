"""Read your own texts from CSV, TSV, JSON lines or Parquet files, or from a data set of the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from geolora_pl.data.labels import LabelColumns
from geolora_pl.data.texts.labelled import TextDataModule
from geolora_pl.data.texts.labels import to_dataset, with_several_labels
from geolora_pl.data.texts.places import FromFiles, FromHub, Rows
from geolora_pl.notes import keep_notes


class LabelledTexts(Rows, TextDataModule):
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
        label_separator: What stands between the labels of one text in ``label_column``, such as ``|``, where a text has
            several labels or none.
        label_columns: A column of 0 and 1 for each of several labels, instead of ``label_column``.
        **kwargs: Arguments of :class:`TextDataModule`.

    Raises:
        ValueError: ``labels`` holds a label twice or one that is not a string, or is given for a regression, two
            columns have the same name, or settings of labels do not go together.
    """

    nested = False

    def __init__(
        self,
        text_column: str = "text",
        pair_column: str | None = None,
        label_column: str = "label",
        labels: list[str] | None = None,
        regression: bool | None = None,
        label_separator: str | None = None,
        label_columns: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.labels = LabelColumns(label_column, labels, regression, label_separator, label_columns)
        self.text_columns = [text_column] if pair_column is None else [text_column, pair_column]
        columns = [*self.text_columns, *self.labels.columns]
        if len(set(columns)) < len(columns):
            raise ValueError(
                f"text_column={text_column!r}, pair_column={pair_column!r} and "
                f"{'label_column' if label_columns is None else 'label_columns'}="
                f"{(label_columns or label_column)!r} must be different columns"
            )

    def columns_of(self, split: str) -> Sequence[str]:
        """Return the columns of texts and of labels; only ``predict`` has no labels."""
        return self.text_columns if split == "predict" else [*self.text_columns, *self.labels.columns]

    @property
    def multi_label(self) -> bool:
        """Whether a text may have several labels."""
        return self.labels.multi_label

    @property
    def class_names(self) -> list[str]:
        """The labels, in the order of their indices; none in a regression."""
        if self.labels.names is None:
            with keep_notes(self.notes):
                self.load_splits()
        assert self.labels.names is not None
        return self.labels.names

    def to_texts(self, table: pa.Table, split: str, source: str) -> datasets.Dataset:
        """Map the labels of every split in the same way as those of ``train``."""
        if split == "train":
            self.labels.settle(table, source)
        if self.multi_label and split != "predict":
            return with_several_labels(table, self.text_columns, self.labels, source)
        classes = {label: label for label in self.labels.names or ()}
        label = None if split == "predict" else self.labels.label_column
        return to_dataset(table, self.text_columns, label, classes, source)


class TextFiles(FromFiles, LabelledTexts):
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


class TextHub(FromHub, LabelledTexts):
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

    def read(self) -> Mapping[str, tuple[str, Any]]:
        """Fetch the data set, or take it from the cache of ``datasets``."""
        tables = dict(super().read())
        source, table = tables.get("test", ("", None))
        if table is not None and set(pc.unique(table[-1]).to_pylist()) <= {None, -1}:  # its labels are hidden
            del tables["test"]
            tables["predict"] = (source, table.select(self.text_columns))
        return tables

    def select(self, rows: datasets.Dataset, split: str, source: str) -> pa.Table:
        """Take the columns of one split, and name labels that are indices."""
        columns = self.columns_of(split)
        table = super().select(rows, split, source)
        feature = rows.features[columns[-1]]
        if self.labels.regression or self.multi_label or not isinstance(feature, datasets.ClassLabel):
            return table
        self.labels.names = self.labels.names or list(feature.names)
        indices = table[-1]
        known = pc.if_else(pc.greater_equal(indices, 0), indices, None)  # -1 stands for an unknown label
        return table.set_column(len(columns) - 1, columns[-1], pc.take(pa.array(feature.names), known))
