"""Read your own images with a table beside them: their labels, several labels per image, or numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch.utils.data import Dataset

from geolora_pl.data.images.base import ImageDataModule
from geolora_pl.data.images.reader import FileImages, Sample, note_conversions
from geolora_pl.data.labels import LabelColumns
from geolora_pl.data.texts.tables import read_table
from geolora_pl.notes import keep_notes


class ImageTable(ImageDataModule):
    r"""Images named in tables, with one label, several labels or a number in each row.

    Labels that are words or whole numbers are classes. Numbers with decimals are the targets of a regression, and so
    are whole numbers with ``regression=True``. Images of the folder that no table names are left out.

    Args:
        train_file: The table of the training images: ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet``.
        folder: The folder from which the files are named; by default that of each table.
        val_file: The table of the validation images; by default a part of the training images is held out.
        test_file: The table of the test images.
        file_column: The column of the names of files, which may lead through folders.
        label_column: The column of labels or numbers.
        labels: The labels in the order of their indices, as strings; by default those of the training images, sorted.
        regression: Whether the labels are numbers to predict; by default they are if they have decimals.
        label_separator: What stands between the labels of one image in ``label_column``, such as ``|``, where an image
            has several labels or none.
        label_columns: A column of 0 and 1 for each of several labels, instead of ``label_column``.
        **kwargs: Arguments of :class:`ImageDataModule`.

    Raises:
        ValueError: Settings do not go together; a table is missing, empty or broken or lacks a column; a row names a
            file that is not there, or has a label that is unknown or a number that is not finite; the message names
            table and row.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("L", (8, 8)).save(folder / "a.png")
        >>> _ = Path(folder, "train.csv").write_text("file,age\na.png,31.5\n")
        >>> data = ImageTable(str(folder / "train.csv"), label_column="age")
        >>> data.load_splits()["train"][0][1], data.num_classes
        (tensor(31.5000), 1)
    """

    def __init__(
        self,
        train_file: str,
        folder: str | None = None,
        val_file: str | None = None,
        test_file: str | None = None,
        file_column: str = "file",
        label_column: str = "label",
        labels: list[str] | None = None,
        regression: bool | None = None,
        label_separator: str | None = None,
        label_columns: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.labels = LabelColumns(label_column, labels, regression, label_separator, label_columns)
        if file_column in self.labels.columns:
            raise ValueError(f"file_column={file_column!r} must be another column than those of labels")
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"folder={folder!r} is not a folder (from {Path.cwd()})")
        self.folder = folder
        self.file_column = file_column
        files = {"train": train_file, "val": val_file, "test": test_file}
        self.files = {split: file for split, file in files.items() if file is not None}

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several labels."""
        return self.labels.multi_label

    @property
    def class_names(self) -> list[str]:
        """The labels, in the order of their indices; none in a regression."""
        if self.labels.names is None:
            with keep_notes(self.notes):
                self.labels.settle(self._table("train"), self.files["train"])
        assert self.labels.names is not None
        return self.labels.names

    @property
    def num_classes(self) -> int:
        """Number of classes, which is the number of outputs of a model: 1 for a regression."""
        return len(self.class_names) or 1

    @property
    def predict_inputs(self) -> dict[str, list[str]]:
        """The names of the files of the test images, to write beside the predictions."""
        if "test" not in self.files:
            return {}
        return {"file": self._table("test")[self.file_column].cast(pa.string()).to_pylist()}

    def load_splits(self) -> dict[str, Dataset[Sample]]:
        """Read the tables, find the files, and look at the headers of the images."""
        names = self.class_names  # settled by the training images, for all tables alike
        splits: dict[str, Dataset[Sample]] = {}
        everything: list[Path] = []
        for split, file in self.files.items():
            table = self._table(split)
            paths = self._paths(table, file)
            found = self.labels.several(table, file) if self.multi_label else self.labels.single(table, file)
            is_class = names and not self.multi_label
            splits[split] = FileImages(paths, found.tolist() if is_class else torch.from_numpy(found.copy()))
            everything += paths
        note_conversions(self.folder or self.files["train"], everything)
        return splits

    def _table(self, split: str) -> pa.Table:
        return read_table(self.files[split], [self.file_column, *self.labels.columns])

    def _paths(self, table: pa.Table, file: str) -> list[Path]:
        """The files of the rows, which must all be there."""
        base = Path(self.folder or Path(file).parent)
        paths = [base / str(name) for name in table[self.file_column].cast(pa.string()).fill_null("").to_pylist()]
        for row, path in enumerate(paths):
            if not path.is_file():
                raise ValueError(
                    f"{file}: row {row + 1} has {self.file_column}={table[self.file_column][row].as_py()!r}, which is "
                    f"not a file in {base}: fix the row, or set folder"
                )
        return paths
