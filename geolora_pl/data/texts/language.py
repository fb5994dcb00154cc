"""Read texts, or prompts and completions, for language models, from files or from the hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from geolora_pl.data.texts.places import FromFiles, FromHub, Rows, note_left_out
from geolora_pl.data.texts.sequences import Sequences, encode_pairs, encode_texts, pack, pack_apart, refuse_single
from geolora_pl.data.texts.token_cache import cached, tokenizer_hash


class LanguageDataModule(Rows):
    """The base of the sources for language models: a subclass reads tables.

    Every text ends with the tokenizer's end-of-text token, and starts as the tokenizer starts a text. A completion is
    appended to its prompt unchanged, so begin it with a space if the model should write one; only the completion and
    the end-of-text token are learnt. There are two kinds of sequences:

    - Packed sequences: blocks of ``max_length`` tokens. Either all texts are joined and cut, so that nothing is padded
      or lost, and a token sees earlier texts of its block. Or texts are isolated: whole ones are put together, with
      little padding, and each is read as if it were alone. A text that is too long then goes on in another block, and a
      pair is cut as a single one. All token ids of a split are held in memory.
    - Single texts: a text that is too long loses its end, and a pair first loses the beginning of its prompt.

    Args:
        text_column: The column of texts, if there are no prompts.
        prompt_column: The column of prompts, for pairs.
        completion_column: The column of completions, for pairs.
        packed: Whether sequences are packed; by default texts are and pairs are not.
        isolated: Whether each text of a packed sequence is read as if it were alone; by default pairs are and texts are
            not, which often are parts of one, as the lines of an article are.
        **kwargs: Arguments of :class:`TokenDataModule`; ``batch_size`` counts sequences.

    Raises:
        ValueError: One of ``prompt_column`` and ``completion_column`` is missing, or they are the same.
    """

    tasks = frozenset({"CausalLM"})
    nested = False

    def __init__(
        self,
        text_column: str = "text",
        prompt_column: str | None = None,
        completion_column: str | None = None,
        packed: bool | None = None,
        isolated: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        of_pairs = [prompt_column, completion_column]
        if of_pairs != [None, None] and (None in of_pairs or prompt_column == completion_column):
            raise ValueError(
                f"prompt_column={prompt_column!r} and completion_column={completion_column!r} must be two columns, or "
                "both left out"
            )
        self.pairs = prompt_column is not None
        named = {"prompt": prompt_column, "completion": completion_column} if self.pairs else {"text": text_column}
        self.columns: dict[str, str] = {ours: theirs for ours, theirs in named.items() if theirs is not None}
        self.packed = not self.pairs if packed is None else packed
        self.isolated = self.packed and (self.pairs if isolated is None else isolated)
        if isolated and not self.packed:
            raise ValueError("isolated=True is for packed sequences, and single ones always are: leave it out")

    @property
    def a_sample_is_a_text(self) -> bool:
        """Whether every sample is one text, which a block of packed texts is not."""
        return not self.packed

    def columns_of(self, split: str) -> Sequence[str]:
        """Return the columns of texts, or of prompts and completions, which are the same in every split."""
        return list(self.columns.values())

    def to_texts(self, table: pa.Table, split: str, source: str) -> datasets.Dataset:
        """Return the columns ``text``, or ``prompt`` and ``completion``; empty texts are left out and counted."""
        columns = {ours: table[theirs].cast(pa.string()).fill_null("") for ours, theirs in self.columns.items()}
        texts = pa.table(columns)
        last = texts.column_names[-1]
        empty = pc.equal(pc.utf8_trim_whitespace(texts[last]), "")
        note_left_out(pc.sum(empty).as_py(), len(texts), source, self.columns[last])
        return datasets.Dataset(texts.filter(pc.invert(empty)))

    def check_limit(self, splits: dict[str, datasets.Dataset], tokenizer: PreTrainedTokenizerBase, limit: int) -> None:
        """Refuse a limit that leaves nothing to predict, and a tokenizer without an end-of-text token."""
        refuse_single(limit)
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos_token, with which a text ends: give it one and save it")

    def tokenize(
        self, texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, limit: int, name: str
    ) -> datasets.Dataset:
        """Make sequences of ``input_ids``, with ``labels`` if not every token is learnt."""
        cut = None if self.packed and not (self.pairs and self.isolated) else limit
        encode = encode_pairs if self.pairs else encode_texts
        tokens = cached(
            texts,
            lambda batch: encode(batch, tokenizer, cut),
            (encode.__name__, tokenizer_hash(tokenizer), str(cut)),
            self.cache_dir,
            name,
        )
        if not self.packed:
            return tokens
        return pack_apart(tokens, limit) if self.isolated else pack(tokens, limit)

    def collator(self, tokenizer: PreTrainedTokenizerBase, multiple: int | None) -> Sequences:
        """Return the function that pads a batch to its longest sequence, with labels."""
        return Sequences(tokenizer, multiple)


class LanguageFiles(FromFiles, LanguageDataModule):
    r"""Texts from files: ``.csv``, ``.tsv`` (in which quotes are data), ``.jsonl`` or ``.parquet``.

    Args:
        train_file: The training texts.
        val_file: The validation texts; by default a part of the training texts is held out.
        test_file: The test texts.
        predict_file: Texts whose losses are predicted; by default the test texts.
        **kwargs: Arguments of :class:`LanguageDataModule`.

    Raises:
        ValueError: A file is missing, empty, broken or of another kind, or a column does not exist or is empty.

    Example:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp(), "answers.jsonl")
        >>> _ = file.write_text('{"question": "Is it good?", "answer": " Yes."}\n')
        >>> LanguageFiles(str(file), prompt_column="question", completion_column="answer").load_splits()["train"][0]
        {'prompt': 'Is it good?', 'completion': ' Yes.'}
    """


class LanguageHub(FromHub, LanguageDataModule):
    """Texts from a data set of the hub, or a folder that ``datasets.load_dataset`` can read.

    Args:
        dataset: The name of the data set, or the folder.
        subset: The name of the subset, if there are several.
        splits: The name in the data set for each of our splits, such as ``{train: train, val: validation}``; by default
            those of the usual names ``train``, ``validation`` and ``test`` that exist.
        **kwargs: Arguments of :class:`LanguageDataModule`.

    Raises:
        ValueError: The data set, a split or a column does not exist.
    """
