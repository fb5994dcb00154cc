"""Read texts with the texts that are to be written for them, such as summaries, for models with encoder and decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import datasets
import pyarrow as pa
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from geolora_pl.data.texts.padding import IGNORED
from geolora_pl.data.texts.places import FromFiles, FromHub, Rows
from geolora_pl.data.texts.token_cache import cached, fill_empty, tokenizer_hash, were_cut
from geolora_pl.notes import note


class Seq2SeqDataModule(Rows):
    """The base of the sources of pairs: a text, and the target that is to be written for it.

    Args:
        text_column: The column of texts.
        target_column: The column of targets, such as summaries.
        prefix: What is put before every text, such as ``"summarize: "`` for T5.
        max_target_length: Number of tokens that a target is cut to where it is learnt, special tokens included, at
            least 1; the scores compare with whole targets.
        **kwargs: Arguments of :class:`TokenDataModule`; ``max_length`` is that of the texts.

    Raises:
        ValueError: ``max_target_length`` is below 1, or the two columns are the same.
    """

    tasks = frozenset({"Seq2SeqLM"})
    token_columns = ("input_ids", "labels")
    not_shown = ("target",)

    def __init__(
        self,
        text_column: str = "text",
        target_column: str = "target",
        prefix: str = "",
        max_target_length: int = 128,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if text_column == target_column:
            raise ValueError(f"text_column and target_column are both {text_column!r}, but must be different columns")
        if max_target_length < 1:
            raise ValueError(f"max_target_length={max_target_length} must be at least 1")
        self.columns = {"text": text_column, "target": target_column}
        self.prefix = prefix
        self.max_target_length = max_target_length

    def columns_of(self, split: str) -> Sequence[str]:
        """Return the columns of texts and targets; ``predict`` has no targets."""
        return [self.columns["text"]] if split == "predict" else list(self.columns.values())

    def to_texts(self, table: pa.Table, split: str, source: str) -> datasets.Dataset:
        """Return the columns ``text`` and ``target``; rows in which one of them is empty are left out and counted."""
        names = ["text"] if split == "predict" else ["text", "target"]
        columns: dict[str, list[Any]] = {name: table[self.columns[name]].to_pylist() for name in names}
        for name, values in columns.items():
            for number, value in enumerate(values, 1):
                if not isinstance(value, str | None):
                    raise ValueError(
                        f"{source}: row {number} has {self.columns[name]}={value!r:.80}, which is not a text: fix the "
                        "row"
                    )
            columns[name] = [value or "" for value in values]
        if split != "predict":
            rows = list(zip(*columns.values(), strict=True))
            kept = [row for row in rows if all(value.strip() for value in row)]
            if not kept:
                raise ValueError(
                    f"{source}: {' or '.join(self.columns.values())} is empty in every row: name another column"
                )
            if len(kept) < len(rows):
                note(f"{source}: rows left out because a text or target is empty: {len(rows) - len(kept)}")
            columns = {name: [row[index] for row in kept] for index, name in enumerate(names)}
        return datasets.Dataset(pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()}))

    def check_limit(self, splits: dict[str, datasets.Dataset], tokenizer: PreTrainedTokenizerBase, limit: int) -> None:
        """Refuse limits that leave no token beside the special tokens, or more than the decoder has positions for."""
        special = tokenizer.num_special_tokens_to_add()
        for name, length in (("max_length", limit), ("max_target_length", self.max_target_length)):
            if length <= special:
                raise ValueError(f"{name}={length} leaves no room beside the tokenizer's {special} special tokens")
        self.refuse_beyond_positions("max_target_length", self.max_target_length)

    def tokenize(
        self, texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, limit: int, name: str
    ) -> datasets.Dataset:
        """Tokenize texts and targets; ``target`` itself stays where it is compared with what the model writes."""
        lengths = (limit, self.max_target_length)
        encode = partial(encode_pairs, tokenizer=tokenizer, prefix=self.prefix, lengths=lengths)
        made_with = ("texts and targets", tokenizer_hash(tokenizer), self.prefix, *map(str, lengths))
        tokens = cached(texts, encode, made_with, self.cache_dir, name)
        if count := sum(tokens["target_cut"][:]):
            note(
                f"{name}: {count} of {len(tokens)} targets are cut to max_target_length={self.max_target_length} tokens"
            )
        dropped = ["target_cut", *(["target"] if name == "train" else [])]
        return tokens.remove_columns(dropped)

    def collator(self, tokenizer: PreTrainedTokenizerBase, multiple: int | None) -> Any:
        """Return the function that pads a batch to its longest text and its longest target."""
        collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED, pad_to_multiple_of=multiple)
        return partial(_collate, collate=collate)


class Seq2SeqFiles(FromFiles, Seq2SeqDataModule):
    r"""Texts and targets from files: ``.csv``, ``.tsv`` (in which quotes are data), ``.jsonl`` or ``.parquet``.

    Args:
        train_file: The training pairs.
        val_file: The validation pairs; by default a part of the training pairs is held out.
        test_file: The test pairs.
        predict_file: Texts to write targets for; by default the test texts.
        **kwargs: Arguments of :class:`Seq2SeqDataModule`.

    Raises:
        ValueError: A file is missing, empty, broken or of another kind, a column does not exist, or a row does not hold
            texts.

    Example:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp(), "news.csv")
        >>> _ = file.write_text('article,summary\n"Rain, and more rain.",Rain\n')
        >>> data = Seq2SeqFiles(str(file), text_column="article", target_column="summary")
        >>> data.load_splits()["train"][0]
        {'text': 'Rain, and more rain.', 'target': 'Rain'}
    """


class Seq2SeqHub(FromHub, Seq2SeqDataModule):
    """Texts and targets from a data set of the hub, or a folder that ``datasets.load_dataset`` can read.

    Args:
        dataset: The name of the data set, or the folder.
        subset: The name of the subset, if there are several.
        splits: The name in the data set for each of our splits, such as ``{train: train, val: validation}``; by default
            those of the usual names ``train``, ``validation`` and ``test`` that exist.
        **kwargs: Arguments of :class:`Seq2SeqDataModule`.

    Raises:
        ValueError: The data set, a split or a column does not exist, or a row does not hold texts.
    """


def encode_pairs(
    batch: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, prefix: str, lengths: tuple[int, int]
) -> dict[str, list[Any]]:
    """Tokenize texts and targets.

    Args:
        batch: The columns ``text``, and ``target`` if it is known.
        tokenizer: The tokenizer of the model.
        prefix: What is put before every text.
        lengths: Numbers of tokens that a text and a target are cut to, special tokens included.

    Returns:
        The inputs of the model and their ``length``, ``labels``, ``target``, and whether a text was ``cut`` and a
        target ``target_cut``.
    """
    texts = [prefix + text for text in batch["text"]]
    encoded = tokenizer(texts, truncation=True, max_length=lengths[0], return_length=True, return_attention_mask=False)
    cut = were_cut(encoded, lambda: tokenizer(texts, verbose=False), lengths[0])
    columns = {**encoded, "cut": cut, "target_cut": [False] * len(texts)}
    fill_empty(columns, tokenizer)
    if "target" in batch:
        wanted = batch["target"]
        targets = tokenizer(text_target=wanted, truncation=True, max_length=lengths[1])
        cut = were_cut(targets, lambda: tokenizer(text_target=wanted, verbose=False), lengths[1])
        columns |= {"labels": targets["input_ids"], "target": wanted, "target_cut": cut}
    return columns


def _collate(samples: list[dict[str, Any]], collate: DataCollatorForSeq2Seq) -> dict[str, Any]:
    targets = [sample["target"] for sample in samples if "target" in sample]
    batch = collate([{name: value for name, value in sample.items() if name != "target"} for sample in samples])
    return {**batch, **({"target": targets} if targets else {})}
