"""Read questions with answers that are parts of a context, and cut long contexts into pieces that overlap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from transformers import PreTrainedTokenizerBase

from geolora_pl.data.texts.padding import pad
from geolora_pl.data.texts.pieces import NO_CONTEXT, encode_questions
from geolora_pl.data.texts.places import FromFiles, FromHub, Rows
from geolora_pl.data.texts.squad import read_squad
from geolora_pl.data.texts.token_cache import cached, refuse_slow, tokenizer_hash
from geolora_pl.notes import note

_OF_QUESTION = ("context", "answers")  # columns with one value per question and not per piece
_OF_TRAINING = ("input_ids", "token_type_ids", "start_positions", "end_positions")


class AnswerDataModule(Rows):
    """The base of the sources of questions whose answers are parts of a context.

    A context that is too long is cut into pieces that overlap. In training each piece is a sample, whose answer is its
    first token (such as ``[CLS]``) where the piece does not hold the whole answer. Otherwise a sample is a question
    with all its pieces. Where a question has several answers, the first one is learnt, and each counts as right. A
    question without answers cannot be answered from its context.

    Args:
        question_column: The column of questions.
        context_column: The column of contexts.
        answers_column: The column of answers: lists of ``text`` and of ``answer_start``, the place of its first
            character, or a list of answers with these two.
        id_column: A column to write beside the predictions, such as ``id``.
        stride: Number of tokens that two pieces of a context share, at least 0; by default a quarter of ``max_length``.
        **kwargs: Arguments of :class:`TokenDataModule`; ``batch_size`` counts pieces in training, and else questions.

    Raises:
        ValueError: ``stride`` is below 0, or two columns are the same.
    """

    tasks = frozenset({"QuestionAnswering"})
    not_shown = ("context", "answers", "starts")

    def __init__(
        self,
        question_column: str = "question",
        context_column: str = "context",
        answers_column: str = "answers",
        id_column: str | None = None,
        stride: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.columns = {"question": question_column, "context": context_column}
        if id_column is not None:
            self.columns = {"id": id_column, **self.columns}
        self.answers_column = answers_column
        if len({*self.columns.values(), answers_column}) <= len(self.columns):
            raise ValueError(
                f"the columns {', '.join([*self.columns.values(), answers_column])} must be different ones"
            )
        if stride is not None and stride < 0:
            raise ValueError(f"stride={stride} must be at least 0")
        self.stride = stride
        self.unanswerable = False  # whether a question of the training or validation texts has no answer

    def columns_of(self, split: str) -> Sequence[str]:
        """Return the columns of questions, contexts and answers; ``predict`` has no answers."""
        return [*self.columns.values(), *([] if split == "predict" else [self.answers_column])]

    def to_texts(self, table: pa.Table, split: str, source: str) -> datasets.Dataset:
        """Return the columns ``question`` and ``context``, and of answers their texts and the places of these."""
        columns: dict[str, list[Any]] = {name: table[theirs].to_pylist() for name, theirs in self.columns.items()}
        for name in ("question", "context"):
            for number, text in enumerate(columns[name], 1):
                if not isinstance(text, str) or not text.strip():
                    raise ValueError(
                        f"{source}: row {number} has {self.columns[name]}={text!r:.80}, but must have a text: fix the "
                        "row"
                    )
        if split != "predict":
            column = self.answers_column
            rows = enumerate(zip(table[column].to_pylist(), columns["context"], strict=True), 1)
            found = [_check_answers(*row, f"{source}: row {number}", column) for number, row in rows]
            columns["answers"] = [[text for text, _ in answers] for answers in found]
            columns["starts"] = [[start for _, start in answers] for answers in found]
            if without := sum(not answers for answers in found):
                note(f"{source}: questions without an answer: {without} of {len(found)}")
                self.unanswerable = True
        kinds = {"answers": pa.list_(pa.string()), "starts": pa.list_(pa.int64())}
        return datasets.Dataset(pa.table({name: pa.array(values, kinds.get(name)) for name, values in columns.items()}))

    def hold_out(self, texts: datasets.Dataset) -> dict[str, datasets.Dataset]:
        """Split training questions into ``train`` and ``val`` so that no context is in both.

        Raises:
            ValueError: There is one context.
        """
        contexts = list(dict.fromkeys(texts["context"]))
        order = np.random.default_rng(self.seed).permutation(len(contexts))
        if len(contexts) < 2:
            raise ValueError(
                f"val_fraction={self.val_fraction}: every question has the same context, so that none can be held out: "
                "give questions for validation"
            )
        count = min(max(1, round(self.val_fraction * len(contexts))), len(contexts) - 1)
        held_out = {contexts[index] for index in order[:count]}
        inside = [context in held_out for context in texts["context"]]
        note(
            f"{sum(inside)} of {len(texts)} training questions, those of {count} contexts, are held out for validation "
            f"(val_fraction={self.val_fraction})"
        )
        rows = {"train": np.flatnonzero(np.logical_not(inside)), "val": np.flatnonzero(inside)}
        return {name: texts.select(chosen) for name, chosen in rows.items()}

    def check_limit(self, splits: dict[str, datasets.Dataset], tokenizer: PreTrainedTokenizerBase, limit: int) -> None:
        """Refuse a limit or stride that leave no room for a context, and a tokenizer that knows no offsets."""
        refuse_slow(tokenizer, "is a slow tokenizer, which does not say where its tokens are in a text")
        room = limit - limit // 2 - tokenizer.num_special_tokens_to_add(pair=True)
        if self._stride(limit) >= room:
            raise ValueError(
                f"stride={self._stride(limit)} must be below {room}, the tokens that are left for a context when its "
                f"question takes half of max_length={limit}: lower stride or raise max_length"
            )

    def _stride(self, limit: int) -> int:
        return limit // 4 if self.stride is None else self.stride

    def tokenize(
        self, texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, limit: int, name: str
    ) -> datasets.Dataset:
        """Tokenize questions with the pieces of their contexts: a row per piece in ``train``, and else per question."""
        stride = self._stride(limit)
        encode = partial(encode_questions, tokenizer=tokenizer, limit=limit, stride=stride)
        made_with = ("pieces of contexts", tokenizer_hash(tokenizer), str(limit), str(stride))
        tokens = cached(texts, encode, made_with, self.cache_dir, name)
        pieces = pc.list_value_length(tokens.with_format("arrow")[:]["input_ids"]).to_numpy()
        if count := int((pieces > 1).sum()):
            whole = f"{count} of {len(tokens)} contexts are too long"
            note(f"{name}: {whole} for max_length={limit}, so that there are {pieces.sum()} pieces")
        if count := sum(tokens["question_cut"][:]):
            note(f"{name}: {count} of {len(tokens)} questions are cut to half of max_length={limit}")
        tokens = tokens.remove_columns("question_cut")
        return _one_row_per_piece(tokens) if name == "train" else tokens

    def collator(self, tokenizer: PreTrainedTokenizerBase, multiple: int | None) -> Any:
        """Return the function that makes a batch of pieces, or of questions with all their pieces."""
        return partial(_collate, tokenizer=tokenizer, multiple=multiple)


class AnswerFiles(FromFiles, AnswerDataModule):
    r"""Questions and answers from files: SQuAD's own ``.json``, or ``.jsonl`` and ``.parquet`` with a question per row.

    Args:
        train_file: The training questions.
        val_file: The validation questions; by default a part of the training questions is held out.
        test_file: The test questions.
        predict_file: Questions to answer, which need no answers; by default the test questions.
        **kwargs: Arguments of :class:`AnswerDataModule`.

    Raises:
        ValueError: A file is missing, empty, broken or of another kind, a column does not exist, or in a row a text is
            empty or an answer is not where it should be.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "train.jsonl")
        >>> answers = '{"text": ["Ada"], "answer_start": [0]}'
        >>> _ = file.write_text('{"question": "Who sang?", "context": "Ada sang.", "answers": ' + answers + "}\n")
        >>> AnswerFiles(str(file)).load_splits()["train"][0]
        {'question': 'Who sang?', 'context': 'Ada sang.', 'answers': ['Ada'], 'starts': [0]}
    """

    def read_file(self, file: str, split: str) -> pa.Table:
        """Read one file."""
        if Path(file).suffix.lower() == ".json" and (table := read_squad(file)) is not None:
            there = dict(zip((*self.columns, "answers"), (*self.columns.values(), self.answers_column), strict=True))
            return table.select(list(there)).rename_columns(list(there.values()))
        return super().read_file(file, split)


class AnswerHub(FromHub, AnswerDataModule):
    """Questions and answers from a data set of the hub, or a folder that ``datasets.load_dataset`` can read.

    Args:
        dataset: The name of the data set, such as ``rajpurkar/squad``, or the folder.
        subset: The name of the subset, if there are several.
        splits: The name in the data set for each of our splits, such as ``{train: train, val: validation}``; by default
            those of the usual names ``train``, ``validation`` and ``test`` that exist.
        **kwargs: Arguments of :class:`AnswerDataModule`.

    Raises:
        ValueError: The data set, a split or a column does not exist, or in a row a text is empty or an answer is not
            where it should be.
    """


def _check_answers(given: object, context: str, row: str, column: str) -> list[tuple[str, int]]:
    """The answers of a row, each with its place."""
    if isinstance(given, dict):
        texts, starts = given.get("text"), given.get("answer_start")
    elif isinstance(given, list) and all(isinstance(answer, dict) for answer in given):
        texts, starts = [[answer.get(name) for answer in given] for name in ("text", "answer_start")]
    else:
        texts, starts = None, None
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise ValueError(
            f"{row} has {column}={given!r:.80}, which are not a text and an answer_start for each answer: fix the row"
        )
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text.strip() or not isinstance(start, int):
            raise ValueError(
                f"{row} has the answer {text!r:.80} at answer_start={start!r}: it must be a text and a whole number; "
                f"leave {column} empty where there is none"
            )
        if start < 0 or context[start : start + len(text)] != text:
            there = context[max(start, 0) : max(start, 0) + len(text)]
            raise ValueError(
                f"{row} has the answer {text!r:.80} at answer_start={start}, where its context has {there!r:.80}: fix "
                "the row; characters are counted from 0"
            )
    return list(zip(texts, starts, strict=True))


def _one_row_per_piece(tokens: datasets.Dataset) -> datasets.Dataset:
    table = tokens.with_format("arrow")[:]
    columns = {name: pc.list_flatten(table[name]) for name in _OF_TRAINING if name in table.column_names}
    return datasets.Dataset(pa.table({**columns, "length": pc.list_value_length(columns["input_ids"])}))


def _collate(samples: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, multiple: int | None) -> dict[str, Any]:
    if "context" not in samples[0]:  # pieces
        return _of_pieces(samples, tokenizer, multiple)
    batch: dict[str, Any] = {name: [sample[name] for sample in samples] for name in _OF_QUESTION if name in samples[0]}
    names = [name for name in samples[0] if name not in _OF_QUESTION]
    rows = [
        {"question": number, **{name: sample[name][piece] for name in names}}
        for number, sample in enumerate(samples)
        for piece in range(len(sample["input_ids"]))
    ]
    return {**batch, **_of_pieces(rows, tokenizer, multiple)}


def _of_pieces(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, multiple: int | None
) -> dict[str, Any]:
    batch = pad(rows, tokenizer, multiple, {"begins": NO_CONTEXT, "ends": NO_CONTEXT})
    single = [name for name, value in rows[0].items() if isinstance(value, int)]
    return {**batch, **{name: torch.tensor([row[name] for row in rows]) for name in single}}
