"""Define the base of the sources of texts with labels: classes or numbers, single texts or pairs."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from geolora_pl.data.texts.base import TokenDataModule
from geolora_pl.data.texts.token_cache import tokenize


class TextDataModule(TokenDataModule):
    """The base of the sources of labelled texts: a subclass names its classes and loads its texts.

    The columns are ``text``, ``text_pair`` for pairs, and ``label`` if labels are known: a class index, a number, or 0
    and 1 for each of several labels. Every class keeps its share in the texts held out for validation. The arguments
    are those of :class:`TokenDataModule`.
    """

    tasks = frozenset({"TextClassification"})

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of their indices; none in a regression."""
        raise NotImplementedError(f"{type(self).__name__} must name its classes")

    @property
    def is_regression(self) -> bool:
        """Whether the labels are numbers to predict rather than classes."""
        return not self.class_names

    @property
    def multi_label(self) -> bool | None:
        """Whether a text may have several labels or none; ``None`` where nobody knows it here."""
        return False

    @property
    def num_classes(self) -> int:
        """Number of classes, which is the number of outputs of a model: 1 for a regression."""
        return len(self.class_names) or 1

    @property
    def metrics(self) -> list[str]:
        """The default metrics of these data; none to leave the choice to the task."""
        if self.multi_label:
            return []
        return ["pearson", "spearman"] if self.is_regression else ["accuracy"]

    @property
    def class_counts(self) -> list[int]:
        """The number of training texts of each class, known after ``setup``."""
        labels = np.asarray(self._split("train")["label"][:])
        return np.bincount(labels, minlength=self.num_classes).tolist()  # type: ignore[no-any-return]

    def check_limit(self, splits: dict[str, datasets.Dataset], tokenizer: PreTrainedTokenizerBase, limit: int) -> None:
        """Refuse a limit that leaves no token beside the special tokens."""
        special = tokenizer.num_special_tokens_to_add(
            any("text_pair" in texts.column_names for texts in splits.values())
        )
        if limit <= special:
            raise ValueError(
                f"max_length={limit} leaves no room for a text beside the tokenizer's {special} special tokens"
            )

    def tokenize(
        self, texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, limit: int, name: str
    ) -> datasets.Dataset:
        """Tokenize texts or pairs and cut them to the limit."""
        return tokenize(texts, tokenizer, limit, self.cache_dir, name)

    def collator(self, tokenizer: PreTrainedTokenizerBase, multiple: int | None) -> Any:
        """Return the function that pads a batch to its longest text."""
        return DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple)

    def hold_out(self, texts: datasets.Dataset) -> dict[str, datasets.Dataset]:
        """Split training texts into ``train`` and ``val``; labels may be plain indices."""
        if not (self.is_regression or self.multi_label) and not isinstance(
            texts.features["label"], datasets.ClassLabel
        ):
            texts = texts.cast_column("label", datasets.ClassLabel(names=self.class_names))
        return super().hold_out(texts)

    def stratify_by(self, texts: datasets.Dataset) -> str | None:
        """Return the column of labels, if they are classes.

        Raises:
            ValueError: A class has only one text.
        """
        if self.is_regression or self.multi_label:
            return None
        if 1 in (counts := np.bincount(texts["label"][:]).tolist()):
            raise ValueError(
                f"class {self.class_names[counts.index(1)]!r} has one text, which cannot be both in training and held "
                "out: drop the class, or give texts for validation"
            )
        return "label"
