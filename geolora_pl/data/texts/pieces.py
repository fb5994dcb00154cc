"""Tokenize questions together with the pieces of their contexts, and find the tokens of an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

NO_CONTEXT = -1  # where a token that is not of the context begins and ends


def encode_questions(
    batch: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, limit: int, stride: int
) -> dict[str, list[Any]]:
    """Tokenize questions with the pieces of their contexts.

    Args:
        batch: The columns ``question`` and ``context``, and ``answers`` and ``starts`` if they are known.
        tokenizer: A fast tokenizer.
        limit: Number of tokens of a question and a piece, special tokens included.
        stride: Number of tokens that two pieces share.

    Returns:
        For each question ``context``, ``answers``, ``length`` (of its longest piece) and ``question_cut``, whether it
        was cut to half of the limit; and for each of its pieces the inputs of the model, ``begins`` and ``ends`` (the
        characters of the context that a token is of, or -1), ``null`` (the token that stands for no answer) and
        ``start_positions`` and ``end_positions`` (the first and the last token of the answer).
    """
    questions, cut = _cut(batch["question"], tokenizer, limit // 2)
    encoded = tokenizer(
        questions,
        batch["context"],
        truncation="only_second",
        max_length=limit,
        stride=stride,
        return_overflowing_tokens=True,
        return_attention_mask=False,
    )
    inputs = [name for name in tokenizer.model_input_names if name in encoded]
    known = "answers" in batch
    names = [*inputs, "begins", "ends", "null", *(["start_positions", "end_positions"] if known else [])]
    columns: dict[str, list[Any]] = {name: [[] for _ in questions] for name in names}
    for piece, number in enumerate(encoded["overflow_to_sample_mapping"]):
        encoding = encoded.encodings[piece]
        begins, ends = _context(encoding)
        row = {name: encoded[name][piece] for name in inputs} | {"begins": begins, "ends": ends}
        row["null"] = _null(encoding.ids, tokenizer)
        if known:
            texts, starts = batch["answers"][number], batch["starts"][number]
            span = _span(begins, ends, *_words(texts[0], starts[0])) if texts else None
            row["start_positions"], row["end_positions"] = span or (row["null"], row["null"])
        for name in names:
            columns[name][number].append(row[name])
    of_question = {"context": batch["context"], **({"answers": batch["answers"]} if known else {})}
    lengths = [max(map(len, pieces)) for pieces in columns["input_ids"]]
    return {**of_question, **columns, "length": lengths, "question_cut": cut}


def _cut(questions: Sequence[str], tokenizer: PreTrainedTokenizerBase, limit: int) -> tuple[list[str], list[bool]]:
    """Cut questions to a number of tokens, for only contexts are cut into pieces."""
    encoded = tokenizer(
        list(questions),
        truncation=True,
        max_length=limit,
        add_special_tokens=False,
        return_offsets_mapping=True,
    )
    cut = [bool(encoding.overflowing) for encoding in encoded.encodings]
    ends = [max((end for _, end in offsets), default=0) for offsets in encoded["offset_mapping"]]
    return [text[:end] if was else text for text, end, was in zip(questions, ends, cut, strict=True)], cut


def _context(encoding: Encoding) -> tuple[list[int], list[int]]:
    """Where each token of the context begins and ends in it, and -1 for the others."""
    rows = zip(encoding.offsets, encoding.sequence_ids, strict=True)
    inside = [
        offset if sequence == 1 and offset[0] < offset[1] else (NO_CONTEXT, NO_CONTEXT) for offset, sequence in rows
    ]
    return [begin for begin, _ in inside], [end for _, end in inside]


def _null(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """The first token that stands for the whole sequence, or the first of all."""
    special = next((token for token in (tokenizer.cls_token_id, tokenizer.bos_token_id) if token in ids), None)
    return 0 if special is None else ids.index(special)


def _words(text: str, start: int) -> tuple[int, int]:
    """Where an answer begins and ends without the white space around it, which may be of no token."""
    return start + len(text) - len(text.lstrip()), start + len(text.rstrip())


def _span(begins: Sequence[int], ends: Sequence[int], start: int, end: int) -> tuple[int, int] | None:
    """The first and the last token of an answer, if the piece holds all of it."""
    tokens = [token for token, begin in enumerate(begins) if begin != NO_CONTEXT]
    touched = [token for token in tokens if begins[token] < end and ends[token] > start]
    if not touched or begins[tokens[0]] > start or ends[tokens[-1]] < end:
        return None
    return touched[0], touched[-1]
