"""Read conversations for language models that answer, from files or from the hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import datasets
import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from geolora_pl.data.texts.conversations import Row, of_columns, read_conversations, to_dataset
from geolora_pl.data.texts.padding import IGNORED
from geolora_pl.data.texts.places import FromFiles, FromHub, Rows
from geolora_pl.data.texts.sequences import Sequences, pack_apart, refuse_single
from geolora_pl.data.texts.token_cache import cached, refuse_slow, tokenizer_hash
from geolora_pl.data.texts.turns import encode_chats, encode_prompts
from geolora_pl.notes import note


class ChatDataModule(Rows):
    """The base of the sources of conversations: a subclass reads rows.

    The chat template of the tokenizer writes the messages, and only the turns of the assistant are learnt, each with
    the token that ends it. A row is one of these:

    - ``{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}``, with ``tools``
      if there are any;
    - ``{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}``, as of ShareGPT;
    - ``{"prompt": ..., "completion": ...}``, one turn of each.

    Conversations without an answer, or with an empty turn, are left out, and a message says how many. One that is too
    long loses its end.

    Args:
        packed: Whether several conversations are put into a sequence of up to ``max_length`` tokens, which saves
            padding. Each is read as if it were alone.
        **kwargs: Arguments of :class:`TokenDataModule`; ``batch_size`` counts sequences.

    Attributes:
        asks: Whether the texts are what a user says, which a chat template must write; a class attribute.
    """

    tasks = frozenset({"CausalLM"})
    asks = True

    def __init__(self, packed: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.packed = packed
        self.isolated = packed

    @property
    def a_sample_is_a_text(self) -> bool:
        """``False``: a sample is a conversation, or several."""
        return False

    def to_texts(self, table: Iterable[tuple[str, Row]], split: str, source: str) -> datasets.Dataset:
        """Return the columns ``chat``, as JSON, and ``where``, of rows with the place of each."""
        texts = to_dataset(table, source, answered=split != "predict")
        if split == "predict":
            self.predict_inputs = {"prompt": [json.loads(chat)["messages"][-1]["content"] for chat in texts["chat"]]}
        return texts

    def check_limit(self, splits: dict[str, datasets.Dataset], tokenizer: PreTrainedTokenizerBase, limit: int) -> None:
        """Refuse a limit that leaves nothing to predict, and a tokenizer that cannot write or find turns."""
        refuse_single(limit)
        if not tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template, so that it is not known how the model reads a conversation: take "
                "a model for chats, or give one as model.chat_template, the name of a file with a Jinja template"
            )
        refuse_slow(tokenizer, "does not say where its tokens are in a text, so that the turns cannot be found")

    def tokenize(
        self, texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, limit: int, name: str
    ) -> datasets.Dataset:
        """Make sequences of ``input_ids`` with ``labels``, and for ``predict`` those before the answers."""
        encode = encode_prompts if name == "predict" else encode_chats
        tokens = cached(
            texts,
            lambda batch: encode(batch, tokenizer, limit),
            (encode.__name__, tokenizer_hash(tokenizer), str(limit)),
            self.cache_dir,
            name,
        )
        if name == "predict":
            self._refuse_without_room(texts, tokens)
            return tokens
        learnt = [any(label != IGNORED for label in labels[1:]) for labels in tokens["labels"]]
        if not all(learnt):
            note(
                f"{name}: {learnt.count(False)} of {len(learnt)} conversations have no answer in the first {limit} "
                "tokens (max_length) and are left out"
            )
            if not any(learnt):
                raise ValueError(f"max_length={limit} leaves no token of an answer in any conversation: raise it")
            tokens = tokens.select(np.flatnonzero(learnt))
        return pack_apart(tokens, limit) if self.packed else tokens

    def _refuse_without_room(self, texts: datasets.Dataset, tokens: datasets.Dataset) -> None:
        """Refuse a conversation to answer that fills all positions of the model."""
        positions = getattr(self._module(), "max_positions", None)
        for where, length in zip(texts["where"], tokens["length"], strict=True):
            if positions is not None and length >= positions:
                raise ValueError(
                    f"{where} has {length} tokens and the model {positions} positions, which leaves no room for an "
                    "answer: shorten it"
                )

    def collator(self, tokenizer: PreTrainedTokenizerBase, multiple: int | None) -> Sequences:
        """Return the function that pads a batch to its longest sequence."""
        return ChatSequences(tokenizer, multiple)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the conversations to answer, in their order.

        Raises:
            ValueError: There are none.
        """
        if "predict" not in self.splits:
            raise ValueError(f"{type(self).__name__} has no conversations to answer: give predict_file")
        return self._loader("predict")


class ChatSequences(Sequences):
    """Make a batch of conversations, padded on the left if they are to be answered."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, multiple: int | None) -> None:
        super().__init__(tokenizer, multiple)
        self.tokenizer = tokenizer

    def __call__(self, samples: list[dict[str, Any]]) -> Mapping[str, Tensor]:
        """Return a batch, without labels if there are no answers to learn."""
        if "labels" in samples[0]:
            return super().__call__(samples)
        return dict(self.tokenizer.pad(samples, padding_side="left", return_tensors="pt"))


class ChatFiles(FromFiles, ChatDataModule):
    r"""Conversations from files: ``.jsonl``, ``.json`` or ``.parquet``.

    Args:
        train_file: The conversations to train on; required unless there is ``predict_file``.
        val_file: Those to validate on; by default a part of the training conversations is held out.
        test_file: Those to test on.
        predict_file: Those to answer; the last turns of the assistant in them are not used.
        **kwargs: Arguments of :class:`ChatDataModule`.

    Raises:
        ValueError: A file is missing, empty, broken or of another kind, or a row is not a conversation.

    Example:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp(), "chats.jsonl")
        >>> _ = file.write_text('{"prompt": "Is it good?", "completion": "Yes."}\n')
        >>> ChatFiles(str(file)).load_splits()["train"][0]["chat"]
        '{"messages": [{"role": "user", "content": "Is it good?"}, {"role": "assistant", "content": "Yes."}]}'
    """

    def __init__(
        self,
        train_file: str | None = None,
        val_file: str | None = None,
        test_file: str | None = None,
        predict_file: str | None = None,
        **kwargs: Any,
    ) -> None:
        if train_file is None and predict_file is None:
            raise ValueError("train_file=None: give the file to train on, or predict_file to answer")
        super().__init__(train_file, val_file, test_file, predict_file, **kwargs)  # type: ignore[arg-type]  # may be None

    def read_file(self, file: str, split: str) -> Iterable[tuple[str, Row]]:
        """Read one file."""
        return read_conversations(file)


class ChatHub(FromHub, ChatDataModule):
    """Conversations from a data set of the hub, or a folder that ``datasets.load_dataset`` can read.

    Args:
        dataset: The name of the data set, or the folder.
        subset: The name of the subset, if there are several.
        splits: The name in the data set for each of our splits, such as ``{train: train_sft, val: test_sft}``; by
            default those of the usual names ``train``, ``validation`` and ``test`` that exist.
        **kwargs: Arguments of :class:`ChatDataModule`.

    Raises:
        ValueError: The data set or a split does not exist, or a row is not a conversation.
    """

    def select(self, rows: datasets.Dataset, split: str, source: str) -> Iterable[tuple[str, Row]]:
        """Take the rows of one split, each with its place."""
        return of_columns(rows, source)
