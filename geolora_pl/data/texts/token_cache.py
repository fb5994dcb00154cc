"""Make the token ids of a data set once and keep them on disk, under a hash of what they were made from."""

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
    """Replace texts by token ids, or take the token ids of an earlier run from the cache.

    Args:
        texts: A data set with the columns ``text``, ``text_pair`` for pairs, and ``label`` if there are labels.
        tokenizer: The tokenizer of the model.
        max_length: Number of tokens that a text or pair is cut to, special tokens included.
        cache_dir: The folder of the cached token ids.
        name: The name of the texts in the progress bar.

    Returns:
        The data set with ``input_ids``, their number ``length``, the other inputs of the model and ``label``. There is
        no attention mask, because padding adds it.
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
    """Replace all columns except ``label`` by those that a function makes of them, or take them from the cache.

    The cache file is written under another name and moved into place, so that several processes with one cache always
    find complete data.

    Args:
        texts: The data set.
        encode: The function from a batch of columns to a batch of new columns.
        made_with: Everything besides the rows on which the new columns depend.
        cache_dir: The folder of the cache.
        name: The name of the texts in the progress bar.
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
    """Return a hash of the rows themselves, whatever files and names they come from."""
    digest = hashlib.sha256(str(dataset.features).encode())
    for table in dataset.with_format("arrow").iter(batch_size=10_000):
        for batch in table.combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of what a tokenizer does, which is the same before and after its first use.

    A call of a fast tokenizer leaves truncation and padding in its state, so the hash leaves them out. The hash of a
    slow tokenizer is that of the whole object, which includes the folder from which it was loaded.
    """
    if not tokenizer.is_fast:
        return str(Hasher.hash(tokenizer))
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= {"truncation": None, "padding": None}
    about = (tokenizer.truncation_side, tokenizer.model_input_names, tokenizers.__version__)
    return hashlib.sha256(json.dumps([state, about]).encode()).hexdigest()
