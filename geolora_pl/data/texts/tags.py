"""Read sentences of words with a tag each, from files or from the hub, and give the tag to each word's first piece."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from geolora_pl.data.texts.conll import SUFFIXES as CONLL
from geolora_pl.data.texts.conll import read_conll
from geolora_pl.data.texts.padding import IGNORED, pad
from geolora_pl.data.texts.places import FromFiles, FromHub, Rows, note_left_out
from geolora_pl.data.texts.tables import read_table
from geolora_pl.data.texts.token_cache import cached, fill_empty, refuse_slow, tokenizer_hash
from geolora_pl.notes import keep_notes, note

NOWHERE = -1  # the word of a token that is not the first piece of one


class TagDataModule(Rows):
    """The base of the sources of tagged words: entities, parts of speech, or whatever each word has.

    The words of a sentence are joined by spaces and tokenized, as the text in which a word stands. Its tag is that of
    its first piece; the others are not learnt (-100), and neither are words that ``max_length`` cuts off, which a
    message counts.

    Args:
        tokens_column: The column of words, a list per sentence.
        tags_column: The column of tags, a list per sentence that is as long.
        tags: The tags in the order of the class indices, as strings; by default those of the training sentences,
            sorted, or those that the data set names.
        **kwargs: Arguments of :class:`TokenDataModule`; ``batch_size`` counts sentences.

    Raises:
        ValueError: ``tags`` holds a tag twice, or one that is not a string, or the two columns are the same.
    """

    tasks = frozenset({"TokenClassification"})
    not_shown = ("tags",)

    def __init__(
        self, tokens_column: str = "tokens", tags_column: str = "tags", tags: list[str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        given: list[Any] = tags or []
        if tags is not None and (len(set(given)) < max(2, len(given)) or not all(isinstance(t, str) for t in given)):
            raise ValueError(
                f"tags={tags!r} must name two or more tags as strings, each once: in YAML put 'no' in quotes"
            )
        if tokens_column == tags_column:
            raise ValueError(f"tokens_column and tags_column are both {tags_column!r}, but must be different columns")
        self.tokens_column = tokens_column
        self.tags_column = tags_column
        self._tags = tags

    def columns_of(self, split: str) -> Sequence[str]:
        """Return the columns of words and of tags; ``predict`` has no tags."""
        return [self.tokens_column] if split == "predict" else [self.tokens_column, self.tags_column]

    @property
    def class_names(self) -> list[str]:
        """The tags, in the order of their indices."""
        if self._tags is None:
            with keep_notes(self.notes):
                self.load_splits()
        assert self._tags is not None
        return self._tags

    @property
    def num_classes(self) -> int:
        """Number of tags."""
        return len(self.class_names)

    def to_texts(self, table: pa.Table, split: str, source: str) -> datasets.Dataset:
        """Return the columns ``tokens`` and ``tags``, whose values are class indices."""
        tokens = table[self.tokens_column].to_pylist()
        _check_lists(tokens, source, self.tokens_column)
        columns: dict[str, list[Any]] = {"tokens": tokens}
        if split != "predict":
            note_left_out(sum(not words for words in tokens), len(tokens), source, self.tokens_column)
            columns["tags"] = self._indices(table[self.tags_column].to_pylist(), tokens, source)
            columns = {
                name: [v for v, words in zip(values, tokens, strict=True) if words] for name, values in columns.items()
            }
        kinds = {"tokens": pa.list_(pa.string()), "tags": pa.list_(pa.int64())}
        return datasets.Dataset(pa.table({name: pa.array(values, kinds[name]) for name, values in columns.items()}))

    def _indices(self, rows: list[Any], tokens: list[list[str]], source: str) -> list[list[int]]:
        _check_lists(rows, source, self.tags_column, (str, int))
        for number, (tags, words) in enumerate(zip(rows, tokens, strict=True), 1):
            if len(tags) != len(words):
                raise ValueError(
                    f"{source}: row {number} has {len(words)} {self.tokens_column} and {len(tags)} {self.tags_column}: "
                    "every word needs one tag"
                )
        if self._tags is None:
            found = _sorted({tag for tags in rows for tag in tags})
            if len(found) < 2:
                raise ValueError(
                    f"{source}: every {self.tags_column} is {found[0]!r}: there must be two tags, name another column"
                )
            self._tags = found
        index = {tag: position for position, tag in enumerate(self._tags)}
        for number, tags in enumerate(rows, 1):
            if unknown := [tag for tag in tags if str(tag) not in index]:
                raise ValueError(
                    f"{source}: row {number} has the tag {unknown[0]!r}, which is none of {', '.join(self._tags)}: fix "
                    "the row, or name all tags"
                )
        return [[index[str(tag)] for tag in tags] for tags in rows]

    def check_limit(self, splits: dict[str, datasets.Dataset], tokenizer: PreTrainedTokenizerBase, limit: int) -> None:
        """Refuse a limit that leaves no token beside the special tokens, and a tokenizer that knows no offsets."""
        refuse_slow(tokenizer, "is a slow tokenizer, which does not say what words its tokens are of")
        if limit <= (special := tokenizer.num_special_tokens_to_add()):
            raise ValueError(
                f"max_length={limit} leaves no room for a word beside the tokenizer's {special} special tokens"
            )

    def tokenize(
        self, texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, limit: int, name: str
    ) -> datasets.Dataset:
        """Tokenize sentences: the columns ``words`` and ``labels`` are those of each token."""
        made_with = ("first pieces", tokenizer_hash(tokenizer), str(limit))
        encode = partial(encode_words, tokenizer=tokenizer, limit=limit)
        tokens = cached(texts, encode, made_with, self.cache_dir, name)
        for column, why in (("cut_off", f"cut off by max_length={limit}"), ("no_token", "nothing to the tokenizer")):
            if count := sum(tokens[column][:]):
                note(f"{name}: words that are {why}, so that they are neither learnt nor tagged: {count}")
        return tokens.remove_columns(["cut_off", "no_token"])

    def collator(self, tokenizer: PreTrainedTokenizerBase, multiple: int | None) -> Any:
        """Return the function that pads a batch to its longest sentence."""
        return partial(_collate, tokenizer=tokenizer, multiple=multiple)


class TagFiles(FromFiles, TagDataModule):
    r"""Tagged words from files: ``.jsonl`` or ``.parquet`` with a list per sentence, or the columns of CoNLL.

    A ``.conll`` or ``.txt`` file has a word per line, its tag as the last field, and an empty line after each sentence.

    Args:
        train_file: The training sentences.
        val_file: The validation sentences; by default a part of the training sentences is held out.
        test_file: The test sentences.
        predict_file: Sentences to tag, which need no tags; by default the test sentences.
        **kwargs: Arguments of :class:`TagDataModule`.

    Raises:
        ValueError: A file is missing, empty, broken or of another kind, a column does not exist, or a row has not one
            known tag for each word.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "train.jsonl")
        >>> _ = file.write_text('{"tokens": ["Ada", "sang"], "tags": ["B-PER", "O"]}\n')
        >>> data = TagFiles(str(file))
        >>> data.load_splits()["train"][0], data.class_names
        ({'tokens': ['Ada', 'sang'], 'tags': [0, 1]}, ['B-PER', 'O'])
    """

    def read_file(self, file: str, split: str) -> pa.Table:
        """Read one file."""
        if Path(file).suffix.lower() in CONLL:
            return read_conll(file, self.tokens_column, None if split == "predict" else self.tags_column)
        if Path(file).suffix.lower() in (".csv", ".tsv"):
            raise ValueError(f"{file} cannot hold lists of words: write it as .jsonl, .parquet or {' or '.join(CONLL)}")
        return read_table(file, self.columns_of(split), nested=True)


class TagHub(FromHub, TagDataModule):
    """Tagged words from a data set of the hub, or a folder that ``datasets.load_dataset`` can read.

    Args:
        dataset: The name of the data set, or the folder.
        subset: The name of the subset, if there are several.
        splits: The name in the data set for each of our splits, such as ``{train: train, val: validation}``; by default
            those of the usual names ``train``, ``validation`` and ``test`` that exist.
        **kwargs: Arguments of :class:`TagDataModule`.

    Raises:
        ValueError: The data set, a split or a column does not exist, or a row has not one known tag for each word.
    """

    def select(self, rows: datasets.Dataset, split: str, source: str) -> pa.Table:
        """Take the columns of one split, and name tags that are indices."""
        table = super().select(rows, split, source)
        feature = getattr(rows.features.get(self.tags_column), "feature", None)
        if split == "predict" or not isinstance(feature, datasets.ClassLabel):
            return table
        self._tags = self._tags or list(feature.names)
        named = [
            tags and [feature.names[tag] if tag in range(len(feature.names)) else str(tag) for tag in tags]
            for tags in table[self.tags_column].to_pylist()
        ]
        return table.set_column(1, self.tags_column, pa.array(named))


def encode_words(batch: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, limit: int) -> dict[str, Any]:
    """Tokenize sentences of words.

    Args:
        batch: The columns ``tokens``, and ``tags`` if they are known.
        tokenizer: A fast tokenizer.
        limit: Number of tokens that a sentence is cut to, special tokens included.

    Returns:
        The inputs of the model and their ``length``; ``words``, for each token the word whose first piece it is, or -1;
        ``labels``, the tag of that word or -100; ``word_count``; and how many words are ``cut_off`` or have
        ``no_token``.
    """
    encoded = tokenizer(
        [" ".join(words) for words in batch["tokens"]],
        truncation=True,
        max_length=limit,
        return_offsets_mapping=True,
        return_length=True,
        return_attention_mask=False,
    )
    offsets = encoded.pop("offset_mapping")
    rows = [_first_pieces(*row) for row in zip(offsets, batch["tokens"], strict=True)]
    lost = [len(words) - sum(word != NOWHERE for word in row) for row, words in zip(rows, batch["tokens"], strict=True)]
    was_cut = [bool(encoding.overflowing) for encoding in encoded.encodings]
    columns = {
        **encoded,
        "words": rows,
        "word_count": [len(words) for words in batch["tokens"]],
        "cut_off": [count if cut else 0 for count, cut in zip(lost, was_cut, strict=True)],
        "no_token": [0 if cut else count for count, cut in zip(lost, was_cut, strict=True)],
    }
    if "tags" in batch:
        columns["labels"] = [
            [IGNORED if word == NOWHERE else tags[word] for word in row]
            for row, tags in zip(rows, batch["tags"], strict=True)
        ]
    fill_empty(columns, tokenizer)
    return columns


def _first_pieces(offsets: Sequence[tuple[int, int]], words: Sequence[str]) -> list[int]:
    """For each token the word whose first piece it is, or -1, by the characters of the words joined by spaces."""
    starts = [0, *accumulate(len(word) + 1 for word in words)]
    row, last = [], NOWHERE
    for start, end in offsets:
        word = bisect_right(starts, end - 1) - 1  # by its last character, for the first one may be the space before
        is_first = end > start and word > last and end - 1 < starts[word] + len(words[word])
        row.append(word if is_first else NOWHERE)
        last = word if is_first else last
    return row


def _collate(
    samples: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, multiple: int | None
) -> dict[str, Tensor]:
    batch = pad(samples, tokenizer, multiple, {"words": NOWHERE, "labels": IGNORED})
    return {**batch, "word_count": torch.tensor([sample["word_count"] for sample in samples])}


def _check_lists(rows: list[Any], source: str, column: str, kinds: tuple[type, ...] = (str,)) -> None:
    what = "strings" if kinds == (str,) else "strings or of whole numbers"
    for number, row in enumerate(rows, 1):
        if not isinstance(row, list) or not all(isinstance(value, kinds) for value in row):
            raise ValueError(
                f"{source}: row {number} has {column}={row!r:.80}, which is not a list of {what}: fix the row"
            )


def _sorted(tags: Collection[str | int]) -> list[str]:
    """The names of tags, numbers by their value."""
    return [str(tag) for tag in sorted(tags, key=lambda tag: (isinstance(tag, str), tag))]
