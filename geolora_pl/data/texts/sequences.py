"""Turn texts into the sequences that a language model is trained on: ends, masks, blocks and batches."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from geolora_pl.data.texts.padding import IGNORED

Columns = dict[str, list[list[int]] | list[int] | list[bool]]


def refuse_single(limit: int) -> None:
    """Refuse a limit that leaves a language model nothing to predict.

    Raises:
        ValueError: It is below 2.
    """
    if limit < 2:
        raise ValueError(f"max_length={limit} leaves no token to predict from another: it must be at least 2")


def encode_texts(batch: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, limit: int | None) -> Columns:
    """Return token ids of texts, each with the end-of-text token at its end.

    Args:
        batch: A batch with the column ``text``.
        tokenizer: The tokenizer of the model.
        limit: Number of tokens that a text is cut to, which removes the end-of-text token; ``None`` for no limit.

    Returns:
        The columns ``input_ids``, ``length`` and ``cut``, whether a text was cut.
    """
    whole = [[*_open(ids, tokenizer), tokenizer.eos_token_id] for ids in _ids(tokenizer, batch["text"])]
    texts = [ids[:limit] for ids in whole]
    cut = [len(ids) > len(text) for ids, text in zip(whole, texts, strict=True)]
    return {"input_ids": texts, "length": [len(text) for text in texts], "cut": cut}


def encode_pairs(batch: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, limit: int | None) -> Columns:
    """Return token ids of prompts, completions and the end-of-text token, and labels that leave out the prompt.

    Args:
        batch: A batch with the columns ``prompt`` and ``completion``.
        tokenizer: The tokenizer of the model.
        limit: Number of tokens that a pair is cut to. First the beginning of the prompt is removed, except for the
            token that starts a text, then the end of the completion; ``None`` for no limit.

    Returns:
        The columns ``input_ids``, ``labels``, ``length`` and ``cut``, whether a pair was cut.
    """
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    cut: list[bool] = []
    prompts = _ids(tokenizer, batch["prompt"])
    completions = _ids(tokenizer, batch["completion"], add_special_tokens=False)
    for opened, words in zip(prompts, completions, strict=True):
        prompt, completion = _open(opened, tokenizer), [*words, tokenizer.eos_token_id]
        cut.append(limit is not None and len(prompt) + len(completion) > limit)
        if limit is not None:
            start = prompt[:1] if prompt[:1] == [tokenizer.bos_token_id] else []
            room = max(0, limit - len(completion) - len(start))
            prompt = start + prompt[max(len(start), len(prompt) - room) :]
            completion = completion[: limit - len(prompt)]
        columns["input_ids"].append(prompt + completion)
        columns["labels"].append([IGNORED] * len(prompt) + completion)
    return {**columns, "length": [len(ids) for ids in columns["input_ids"]], "cut": cut}


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], **settings: bool) -> list[list[int]]:
    encoded = tokenizer(
        texts, return_attention_mask=False, verbose=False, **settings
    )  # no warning about long texts, which are cut later
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _open(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Remove the end that some tokenizers add, because a completion follows or the end is added later."""
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def pack(tokens: datasets.Dataset, size: int) -> datasets.Dataset:
    """Join all sequences and cut them into blocks, in which a token sees all that is before it.

    Args:
        tokens: Columns of lists of numbers, with the same lengths in every column, and the column ``length``.
        size: Number of tokens per block; the last block may have fewer.

    Example:
        >>> tokens = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5]], "length": [3, 2]})
        >>> pack(tokens, 2).to_dict()
        {'input_ids': [[1, 2], [3, 4], [5]], 'length': [2, 2, 1]}
    """
    table = tokens.with_format("arrow")[:]
    total = pc.sum(table["length"]).as_py()
    cuts = np.append(np.arange(0, total, size), total)
    return datasets.Dataset(pa.table(_blocks(table, cuts)))


def _blocks(table: pa.Table, cuts: Any, order: Any = None) -> dict[str, Any]:
    """Columns of lists with the same numbers one after the other, perhaps in another order, cut in other places."""
    flat = {n: pc.list_flatten(table[n]).combine_chunks() for n in table.column_names if n != "length"}
    if order is not None:
        flat = {name: values.take(order) for name, values in flat.items()}
    lists = {name: pa.LargeListArray.from_arrays(cuts, values) for name, values in flat.items()}
    return {**lists, "length": np.diff(cuts)}


def pack_apart(tokens: datasets.Dataset, size: int) -> datasets.Dataset:
    """Put whole sequences into blocks, in which each is read as if it were alone.

    The longest go first, each into the block with the least room that is enough (best fit). Only what is longer than a
    block is cut into several, of which nothing is lost.

    Args:
        tokens: Columns of lists of numbers, with the same lengths in every column, and the column ``length``.
        size: Largest number of tokens per block.

    Returns:
        The columns, and ``texts``: the lengths of the texts in each block.

    Example:
        >>> tokens = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5], [6]], "length": [3, 2, 1]})
        >>> pack_apart(tokens, 4).to_dict()
        {'input_ids': [[1, 2, 3, 6], [4, 5]], 'length': [4, 2], 'texts': [[3, 1], [2]]}
    """
    table = tokens.with_format("arrow")[:]
    ends = np.cumsum(table["length"].to_numpy())
    begins = ends - table["length"].to_numpy()
    pieces = [(b, min(b + size, end)) for begin, end in zip(begins, ends, strict=True) for b in range(begin, end, size)]
    lengths = [end - begin for begin, end in pieces]
    blocks = _best_fit(lengths, size)
    order = np.concatenate([np.arange(*pieces[piece]) for block in blocks for piece in block])
    texts = [[lengths[piece] for piece in block] for block in blocks]
    cuts = np.cumsum([0, *map(sum, texts)])
    return datasets.Dataset(pa.table({**_blocks(table, cuts, pa.array(order)), "texts": texts}))


def _best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which of the lengths are in each block, in the order of their first ones."""
    blocks: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # the blocks by their room
    rooms: list[int] = []  # the rooms that there are, sorted
    for piece in sorted(range(len(lengths)), key=lambda piece: -lengths[piece]):
        place = bisect_left(rooms, lengths[piece])
        if place == len(rooms):
            block, room = len(blocks), size
            blocks.append([])
        else:
            room = rooms[place]
            block = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        blocks[block].append(piece)
        if left := room - lengths[piece]:
            if left not in with_room:
                insort(rooms, left)
            with_room.setdefault(left, []).append(block)
    return sorted(sorted(block) for block in blocks)


class Sequences:
    """Make a batch of sequences, padded on the right; padding is not learnt.

    Blocks of texts that are read as if they were alone get ``position_ids`` in the place of the attention mask. Those
    restart with each text, which the models of transformers take for the beginning of another text, which sees nothing
    of the one before it. Padding is one more text, and the first token of a text is not learnt, as of a text alone.

    Args:
        tokenizer: The tokenizer, which pads; its padding token may also be the end-of-text token.
        multiple: The length of a batch is a multiple of this number.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, multiple: int | None) -> None:
        self.collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED, pad_to_multiple_of=multiple)

    def __call__(self, samples: list[dict[str, Any]]) -> Mapping[str, Tensor]:
        """Return a batch; samples without labels get their own tokens as labels."""
        rows = [{**sample, "labels": sample.get("labels", sample["input_ids"])} for sample in samples]
        lengths = [row.pop("texts", None) for row in rows]
        batch: dict[str, Tensor] = dict(self.collate(rows))
        if lengths[0] is not None:
            del batch["attention_mask"]
            width = batch["input_ids"].shape[1]
            positions = [torch.cat([torch.arange(n) for n in (*of_row, width - sum(of_row))]) for of_row in lengths]
            batch["position_ids"] = torch.stack(positions)
            batch["labels"][batch["position_ids"] == 0] = IGNORED
        return batch
