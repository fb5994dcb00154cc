"""Make the token ids of a data set once and keep them on disk, under a hash of what they were made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import tokenizers
from datasets.fingerprint import Hasher
from transformers import BatchEncoding, PreTrainedTokenizerBase

from geolora_pl.notes import note

# Columns that say what was done to a text; they are counted and dropped.
_MARKS = {
    "cut": "texts are cut to max_length={longest} tokens",
    "empty": "texts have no tokens and are read as an end of text",
    "rewritten": "conversations have earlier turns that the chat template writes in another way once they are answered "
    "(such as without thinking), so that only the others are learnt",
    "endless": "conversations end with no special token in the chat template, from which a model hardly learns to end",
}


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
        texts_of = (batch["text"], batch.get("text_pair"))
        encoded["cut"] = were_cut(encoded, lambda: tokenizer(*texts_of, verbose=False), max_length)
        fill_empty(encoded, tokenizer)
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
    fingerprint = hashlib.sha256("\n".join((content_hash(texts), *_MARKS, *made_with)).encode()).hexdigest()
    cache_dir.mkdir(parents=True, exist_ok=True)
    path = cache_dir / f"{fingerprint}.arrow"
    whole = _is_whole(path, fingerprint, len(texts))
    if path.exists() and not whole:
        note(f"{path} is cut short or holds other texts, so the token ids are made again")
    tokens = texts.map(
        encode,
        batched=True,
        remove_columns=[column for column in texts.column_names if column != "label"],
        new_fingerprint=fingerprint,
        cache_file_name=str(path),
        load_from_cache_file=whole,
        desc=f"tokenizing {name}",
    )
    for mark, what in _MARKS.items():
        if mark in tokens.column_names:
            if count := sum(tokens[mark][:]):
                note(f"{name}: {count} of {len(tokens)} {what.format(longest=max(tokens['length'][:]))}")
            tokens = tokens.remove_columns(mark)
    return tokens


def _is_whole(path: Path, fingerprint: str, rows: int) -> bool:
    """Whether a file of the cache is complete and was made of these texts."""
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
            made_with = json.loads((stream.schema.metadata or {}).get(b"huggingface", b"{}")).get("fingerprint")
            return bool(made_with == fingerprint and sum(len(batch) for batch in stream) == rows)
    except (pa.ArrowException, OSError, ValueError):
        return False


def were_cut(encoded: BatchEncoding, whole: Callable[[], BatchEncoding], max_length: int) -> list[bool]:
    """Return whether each text was cut.

    Args:
        encoded: What the tokenizer made of the texts.
        whole: Makes them again without cutting, which is done for a slow tokenizer, for that does not say.
        max_length: Number of tokens that the texts were cut to.
    """
    if encoded.encodings is not None:
        return [bool(encoding.overflowing) for encoding in encoded.encodings]
    return [len(ids) > max_length for ids in whole()["input_ids"]]


def refuse_slow(tokenizer: PreTrainedTokenizerBase, why: str) -> None:
    """Refuse a tokenizer that does not say where in a text its tokens are.

    Args:
        tokenizer: The tokenizer of the model.
        why: What it does not do, and so what cannot be done.

    Raises:
        ValueError: It is a slow one.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} {why}: take a model with a tokenizer.json")


def fill_empty(encoded: MutableMapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a text without tokens the end-of-text token, for a model cannot read a sequence of none.

    Args:
        encoded: Columns of token ids and of the other inputs of a model, and their ``length``; they are changed.
        tokenizer: The tokenizer that made them.
    """
    tokens = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id)
    filler = next((token for token in tokens if token is not None), 0)
    encoded["empty"] = [not ids for ids in encoded["input_ids"]]
    for row in (row for row, empty in enumerate(encoded["empty"]) if empty):
        for name in tokenizer.model_input_names:
            if name in encoded:
                encoded[name][row] = [filler if name == "input_ids" else 0]
        encoded["length"][row] = 1


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
    about: list[Any] = [tokenizer.truncation_side, tokenizer.model_input_names, tokenizers.__version__]
    about += [getattr(tokenizer, "split_special_tokens", False), tokenizer.chat_template]
    about += [tokenizer.special_tokens_map]  # which token ends a text, for one, is not in the state
    return hashlib.sha256(json.dumps([state, about]).encode()).hexdigest()
