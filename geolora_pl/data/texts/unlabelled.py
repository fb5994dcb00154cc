"""Read texts to predict, from the lines of a file or from a column of a table."""

from __future__ import annotations

from pathlib import Path

import datasets
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from geolora_pl.data.texts.labelled import TextDataModule
from geolora_pl.data.texts.labels import to_dataset
from geolora_pl.data.texts.tables import read_table, read_text


class UnlabelledTexts(TextDataModule):
    r"""The texts of a file, in their order, for ``predict`` alone.

    Args:
        file: A ``.txt`` file with one text per line, or a table: ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet``.
        text_column: The column of texts in a table.
        pair_column: The column of the second texts, for pairs; not for a ``.txt`` file.
        batch_size: Texts or pairs per step and process, at least 1.
        max_length: Number of tokens that a text is cut to; give the value with which the model was trained.
        num_workers: Number of loader processes, as for :class:`TextDataModule`.
        cache_dir: The folder of the cached token ids, as for :class:`TextDataModule`.
        prefix: What is put before every text; give the value with which the model was trained.

    Raises:
        ValueError: The file is missing, empty, broken or of another kind, or a column does not exist.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "reviews.txt")
        >>> _ = file.write_text("good\nbad\n")
        >>> UnlabelledTexts(str(file)).load_splits()["predict"]["text"][:]
        ['good', 'bad']
    """

    tasks = frozenset({"TextClassification", "Seq2SeqLM"})

    def __init__(
        self,
        file: str,
        text_column: str = "text",
        pair_column: str | None = None,
        batch_size: int = 32,
        max_length: int | None = None,
        num_workers: int | None = None,
        cache_dir: str | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(batch_size, max_length, num_workers=num_workers, cache_dir=cache_dir)
        self.file = Path(file)
        self.prefix = prefix
        self.text_columns = [text_column] if pair_column is None else [text_column, pair_column]
        if self.file.suffix.lower() == ".txt" and pair_column is not None:
            raise ValueError(f"pair_column={pair_column!r} is for a table, but {file} is a file of lines: leave it out")

    @property
    def class_names(self) -> list[str]:
        """An empty list, because only the model knows the classes."""
        return []

    @property
    def num_classes(self) -> None:  # type: ignore[override]  # nobody knows it here
        """``None``, because only the model knows the number of classes."""
        return None

    @property
    def multi_label(self) -> None:
        """``None``, because only the model knows whether a text has several labels."""
        return None

    @property
    def metrics(self) -> list[str]:
        """An empty list, because there are no labels."""
        return []

    def load_splits(self) -> dict[str, datasets.Dataset]:
        """Read the file."""
        if self.file.suffix.lower() == ".txt":
            table = pa.table({self.text_columns[0]: _lines(read_text(self.file))})
        else:
            table = read_table(self.file, self.text_columns)
        return {"predict": to_dataset(table, self.text_columns, None, {}, self.file)}

    def tokenize(
        self, texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, limit: int, name: str
    ) -> datasets.Dataset:
        """Tokenize the texts with the prefix, which is not written beside the predictions."""
        if self.prefix:
            whole = [self.prefix + text for text in texts["text"]]
            table = texts.with_format("arrow")[:]
            texts = datasets.Dataset(table.set_column(table.column_names.index("text"), "text", pa.array(whole)))
        return super().tokenize(texts, tokenizer, limit, name)


def _lines(text: str) -> list[str]:
    # Not splitlines, which splits at form feeds and carriage returns, too.
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
