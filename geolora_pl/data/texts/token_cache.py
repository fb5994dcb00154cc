"""Token ids of a data set, made once and kept on disk under a name that says what they were made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import tokenizers
from datasets.fingerprint import Hasher
from transformers import BatchEncoding, PreTrainedTokenizerBase


def tokenize(
    texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, cache_dir: Path, name: str
) -> datasets.Dataset:
    """Replace texts by token ids, or take those of an earlier run from the cache.

    Args:
        texts: Columns ``text``, ``text_pair`` if there are pairs, and ``label`` if there are labels.
        tokenizer: The model's own.
        max_length: Tokens that a text or pair is cut to, special ones included.
        cache_dir: Where the token ids are kept.
        name: What the progress bar calls the texts.

    Returns:
        The data set with ``input_ids``, ``length`` (their number), what else the model takes (but no attention mask,
        which comes with the padding) and ``label``.
    """

    def encode(batch: Mapping[str, Any]) -> BatchEncoding:
        encoded: BatchEncoding = tokenizer(
            batch["text"],
            batch["text_pair"] if "text_pair" in texts.column_names else None,
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
            return_length=True,
        )
        return encoded

    made_with = (tokenizer_hash(tokenizer), str(max_length))
    return cached(texts, encode, made_with, cache_dir, name)


def cached(
    texts: datasets.Dataset,
    encode: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    made_with: Sequence[str],
    cache_dir: Path,
    name: str,
) -> datasets.Dataset:
    """Replace all columns but ``label`` by those that a function makes of them, or take them from the cache.

    The cache file is written under another name and moved into place, so that processes that meet there all find
    whole data.

    Args:
        texts: The data set.
        encode: From a batch of columns to one of new columns.
        made_with: Besides the rows themselves, all that the new columns depend on.
        cache_dir: Where they are kept.
        name: What the progress bar calls the texts.
    """
    fingerprint = hashlib.sha256("\n".join((content_hash(texts), *made_with)).encode()).hexdigest()
    cache_dir.mkdir(parents=True, exist_ok=True)
    return texts.map(
        encode,
        batched=True,
        remove_columns=[column for column in texts.column_names if column != "label"],
        new_fingerprint=fingerprint,
        cache_file_name=str(cache_dir / f"{fingerprint}.arrow"),
        desc=f"tokenizing {name}",
    )


def content_hash(dataset: datasets.Dataset) -> str:
    """A hash of the rows themselves, whatever files and names they come from."""
    digest = hashlib.sha256(str(dataset.features).encode())
    for table in dataset.with_format("arrow").iter(batch_size=10_000):
        for batch in table.combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what a tokenizer does, which is the same before and after its first use.

    Calling a fast tokenizer leaves the truncation and padding of that call in its state; they do not count here. That
    of a slow one is of the whole object, with the folder from which it was loaded.
    """
    if not tokenizer.is_fast:
        return str(Hasher.hash(tokenizer))
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= {"truncation": None, "padding": None}
    about = (tokenizer.truncation_side, tokenizer.model_input_names, tokenizers.__version__)
    return hashlib.sha256(json.dumps([state, about]).encode()).hexdigest()
