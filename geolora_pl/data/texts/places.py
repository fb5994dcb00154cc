"""Where the rows of a text source lie: in files of the user, or in a data set of the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import datasets

from geolora_pl.data.texts.base import TokenDataModule
from geolora_pl.data.texts.hub import check_split_names, load_hub, select
from geolora_pl.data.texts.tables import read_table
from geolora_pl.notes import note


class Rows(TokenDataModule):
    """A source whose rows are read from somewhere: a subclass names its columns, and turns rows into texts.

    The arguments are those of :class:`TokenDataModule`.

    Attributes:
        nested: Whether columns may hold lists and structures; a class attribute.
    """

    nested: ClassVar[bool] = True

    def columns_of(self, split: str) -> Sequence[str]:
        """Return the columns that a split must have; ``predict`` has no labels."""
        raise NotImplementedError(f"{type(self).__name__} must name its columns")

    def read(self) -> Mapping[str, tuple[str, Any]]:
        """Read the rows: for each split, its name for messages and its table, or what else ``to_texts`` takes."""
        raise NotImplementedError(f"{type(self).__name__} must read its rows")

    def to_texts(self, table: Any, split: str, source: str) -> datasets.Dataset:
        """Turn the rows of a split into texts."""
        raise NotImplementedError(f"{type(self).__name__} must turn rows into texts")

    def load_splits(self) -> dict[str, datasets.Dataset]:
        """Read the rows of every split, ``train`` first."""
        tables = sorted(self.read().items(), key=lambda item: item[0] != "train")
        return {split: self.to_texts(table, split, source) for split, (source, table) in tables}


def note_left_out(count: int | None, rows: int, source: str, column: str) -> None:
    """Say how many of the rows are left out because a column is empty.

    Raises:
        ValueError: All are.
    """
    if not count:
        return
    if count == rows:
        raise ValueError(f"{source}: {column} is empty in every row: name another column")
    note(f"{source}: rows left out because {column} is empty: {count}")


class FromFiles(Rows):
    """Rows from files.

    Args:
        train_file: The training rows.
        val_file: The validation rows; by default a part of the training rows is held out.
        test_file: The test rows.
        predict_file: Rows to predict, which need no labels; by default the test rows.
        **kwargs: Arguments of the source.
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

    def read(self) -> Mapping[str, tuple[str, Any]]:
        """Read the files."""
        return {split: (str(file), self.read_file(file, split)) for split, file in self.files.items()}

    def read_file(self, file: str, split: str) -> Any:
        """Read one file."""
        return read_table(file, self.columns_of(split), nested=self.nested)


class FromHub(Rows):
    """Rows from a data set of the hub, or a folder that ``datasets.load_dataset`` can read.

    Args:
        dataset: The name of the data set, or the folder.
        subset: The name of the subset, if there are several.
        splits: The name in the data set for each of our splits, such as ``{train: train, val: validation}``; by default
            those of the usual names ``train``, ``validation`` and ``test`` that exist.
        **kwargs: Arguments of the source.
    """

    def __init__(
        self, dataset: str, subset: str | None = None, splits: dict[str, str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check_split_names(splits)
        self.dataset = dataset
        self.subset = subset
        self.named_splits = splits

    def read(self) -> Mapping[str, tuple[str, Any]]:
        """Fetch the data set, or take it from the cache of ``datasets``."""
        loaded = load_hub(self.dataset, self.subset, self.named_splits)
        return {split: (source, self.select(rows, split, source)) for split, (source, rows) in loaded.items()}

    def select(self, rows: datasets.Dataset, split: str, source: str) -> Any:
        """Take the columns of one split."""
        return select(rows, self.columns_of(split), source, nested=self.nested)
