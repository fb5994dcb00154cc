"""Define the base of the text sources: splits, tokenizing with the model's own tokenizer, loaders."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar

import datasets
import lightning as L
import pyarrow.compute as pc
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from geolora_pl.data.settings import check_batches, settle_num_workers
from geolora_pl.data.texts.sampler import ShuffledSampler
from geolora_pl.data.texts.token_cache import tokenizer_hash
from geolora_pl.notes import keep_notes, note


class TokenDataModule(L.LightningDataModule):
    """The base of the text sources: a subclass loads texts, tokenizes them and collates batches.

    Texts are tokenized by the tokenizer of the trained model, which the task offers as ``tokenizer``, together with
    ``max_positions`` if the number of positions is limited. This happens once, before training; afterwards the token
    ids are read from a cache on disk, which notices a change of a text, of the tokenizer or of a setting. A batch is
    padded to its longest text.

    Args:
        batch_size: Texts or pairs per step and process, at least 1.
        max_length: Number of tokens that a text or pair is cut to, special tokens included; by default the limit of
            the tokenizer.
        val_fraction: The share of the training texts that is held out for validation if the source has no validation
            split, in (0, 1).
        seed: Seed of the splits and of the order of the training texts.
        num_workers: Number of loader processes; by default the number of cores beyond the first two, at most 8, so
            that they do not slow the training down on a small machine.
        cache_dir: The folder of the cached token ids; by default beside the cache of ``datasets``. It may be deleted.
        group_by_length: Whether the training texts of a batch have similar lengths, which saves padding.

    Attributes:
        tasks: The names of the tasks that the batches are for, none for any; a class attribute. Others are refused.
        token_columns: The columns of token ids, each of which needs an embedding; a class attribute.

    Raises:
        ValueError: An argument is out of range.
    """

    tasks: ClassVar[frozenset[str]] = frozenset()
    token_columns: ClassVar[Sequence[str]] = ("input_ids",)
    not_shown: ClassVar[Collection[str]] = ("label",)  # columns that are not written beside the predictions

    def __init__(
        self,
        batch_size: int = 32,
        max_length: int | None = None,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int | None = None,
        cache_dir: str | None = None,
        group_by_length: bool = True,
    ) -> None:
        super().__init__()
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length={max_length} must be at least 1")
        if seed < 0:
            raise ValueError(f"seed={seed} must be at least 0")
        check_batches(batch_size, val_fraction)
        self.batch_size = batch_size
        self.max_length = max_length
        self.val_fraction = val_fraction
        self.seed = seed
        self.num_workers = settle_num_workers(num_workers)
        self.cache_dir = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "geolora_pl")
        self.group_by_length = group_by_length
        self.splits: dict[str, datasets.Dataset] = {}
        self.notes: list[str] = []  # what the user is told about the data
        self.predict_inputs: dict[str, list[Any]] = {}  # columns to write beside the predictions
        self._made_with: tuple[str, int] | None = None

    def load_splits(self) -> dict[str, datasets.Dataset]:
        """Read the texts, without a trainer.

        Returns:
            Data sets by name: ``train``, and ``val``, ``test`` and ``predict`` if the source has them. There may be
            several of the kinds ``val`` and ``predict``, such as ``val`` and ``val_other``.
        """
        raise NotImplementedError(f"{type(self).__name__} must load its texts")

    def prepare_data(self) -> None:
        """Tokenize in one process, so that the others find the cache."""
        self.setup("fit")

    def setup(self, stage: str) -> None:
        """Load the texts, hold out a part of ``train`` if there is no ``val``, and tokenize."""
        tokenizer = self.tokenizer()
        limit = self._limit(tokenizer)
        if self._made_with == (made_with := (tokenizer_hash(tokenizer), limit)):
            return
        with keep_notes(self.notes):
            self.splits = self._load(tokenizer, limit)
        self._made_with = made_with

    def _load(self, tokenizer: PreTrainedTokenizerBase, limit: int) -> dict[str, datasets.Dataset]:
        splits = self.load_splits()
        self.check_limit(splits, tokenizer, limit)
        if "train" in splits and not _of_kind("val", splits):
            splits |= self.hold_out(splits["train"])
        predicted = _predicted(splits)
        if len(predicted) == 1 and self.a_sample_is_a_text:
            texts = splits[predicted[0]]
            self.predict_inputs = {name: texts[name][:] for name in texts.column_names if name not in self.not_shown}
        tokens = {name: self.tokenize(texts, tokenizer, limit, name) for name, texts in splits.items()}
        for name, of_split in tokens.items():
            self._refuse_unknown_tokens(name, of_split)
        return tokens

    def _refuse_unknown_tokens(self, name: str, tokens: datasets.Dataset) -> None:
        """Refuse token ids that the model has no embedding for, which would end in an IndexError in some step."""
        rows = getattr(self._module(), "num_tokens", None)
        table = tokens.with_format("arrow")[:]
        there = [table[column] for column in self.token_columns if column in table.column_names]
        highest = max(pc.max(pc.list_flatten(ids, recursive=True)).as_py() or 0 for ids in there)
        if rows is not None and highest >= rows:
            raise ValueError(
                f"{name}: the tokenizer gives the id {highest} to a token, but the model has embeddings for the ids 0 "
                f"to {rows - 1} only: give the model its own tokenizer, or resize its embeddings and save it"
            )

    def _limit(self, tokenizer: PreTrainedTokenizerBase) -> int:
        limit = self.max_length or tokenizer.model_max_length
        if limit > 1_000_000:  # the answer of tokenizers without a limit
            raise ValueError("max_length=None: the tokenizer does not know how long a text may be, so give max_length")
        self.refuse_beyond_positions("max_length", limit)
        return limit

    def refuse_beyond_positions(self, name: str, length: int) -> None:
        """Raise a ValueError if a setting asks for more tokens than the model has positions for."""
        positions = getattr(self._module(), "max_positions", None)
        if positions is not None and length > positions:
            raise ValueError(f"{name}={length} is more than the {positions} positions of the model")

    def hold_out(self, texts: datasets.Dataset) -> dict[str, datasets.Dataset]:
        """Split training texts into ``train`` and ``val``."""
        count = round(self.val_fraction * len(texts))
        stratify = self.stratify_by(texts)
        try:
            parts = texts.train_test_split(count, seed=self.seed, stratify_by_column=stratify, keep_in_memory=True)
        except ValueError as error:
            raise ValueError(
                f"val_fraction={self.val_fraction} of {len(texts)} texts is {count}, and that split cannot be made: "
                f"{str(error).rstrip('.')}. Choose another fraction, or give texts for validation"
            ) from error
        note(f"{count} of {len(texts)} training texts are held out for validation (val_fraction={self.val_fraction})")
        return {"train": parts["train"], "val": parts["test"]}

    @property
    def a_sample_is_a_text(self) -> bool:
        """Whether every sample is one text, which is then written beside its prediction."""
        return True

    def check_limit(self, splits: dict[str, datasets.Dataset], tokenizer: PreTrainedTokenizerBase, limit: int) -> None:
        """Raise a ValueError if the limit leaves no room for a text."""
        raise NotImplementedError(f"{type(self).__name__} must check its limit")

    def tokenize(
        self, texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, limit: int, name: str
    ) -> datasets.Dataset:
        """Replace the texts of a split by columns of token ids and their number, ``length``."""
        raise NotImplementedError(f"{type(self).__name__} must tokenize")

    def collator(self, tokenizer: PreTrainedTokenizerBase, multiple: int | None) -> Callable[[list[Any]], Any]:
        """Return the function that makes a batch of samples, padded to a multiple of so many tokens."""
        raise NotImplementedError(f"{type(self).__name__} must collate")

    def stratify_by(self, texts: datasets.Dataset) -> str | None:
        """Return the column whose values keep their shares in the held-out texts, if there is one."""
        return None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer of the module that is trained.

        Raises:
            ValueError: The module has no tokenizer, or is a task that learns from other batches.
        """
        module = self._module()
        take = getattr(module, "sources", "")
        if take and self.tasks and self.tasks.isdisjoint(kind.__name__ for kind in type(module).__mro__):
            name = type(module).__name__
            raise ValueError(f"{type(self).__name__} does not make what {name} learns from: take {take}")
        tokenizer = getattr(module, "tokenizer", None)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(
                f"{type(module).__name__} has no tokenizer: give it one, "
                "tokenizer = transformers.AutoTokenizer.from_pretrained(...), so that texts become what it expects"
            )
        return tokenizer

    def _module(self) -> L.LightningModule | None:
        return None if self.trainer is None else self.trainer.lightning_module

    def splits_of(self, kind: str) -> list[str]:
        """Return the names of the splits of a kind: ``splits_of("val")`` may be ``["val", "val_mismatched"]``."""
        return _of_kind(kind, self.splits)

    def _split(self, name: str) -> datasets.Dataset:
        if name not in self.splits:
            raise ValueError(f"{type(self).__name__} has no {name} texts, but {', '.join(self.splits)}: name some")
        return self.splits[name]

    def _loader(self, name: str) -> DataLoader[Any]:
        tokens = self._split(name)
        samples = tokens.remove_columns("length")
        sampler = None
        if name == "train":
            lengths = tokens["length"][:] if self.group_by_length else None
            assert self.trainer is not None
            processes: dict[str, int] = self.trainer.distributed_sampler_kwargs or {}  # None with one process
            sampler = ShuffledSampler(samples, self.batch_size, lengths, self.seed, **processes)
        on_gpu, tokenizer = torch.cuda.is_available(), self.tokenizer()
        return DataLoader(
            samples,
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=self.collator(tokenizer, 8 if on_gpu and self._limit(tokenizer) % 8 == 0 else None),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=on_gpu,
        )

    def _loaders(self, names: Sequence[str]) -> Any:
        loaders = [self._loader(name) for name in names]
        return loaders if len(loaders) > 1 else loaders[0]

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training texts, in a new order in each epoch."""
        return self._loader("train")

    def val_dataloader(self) -> Any:
        """Return the validation texts in their order, as a list of loaders if there are several sets."""
        return self._loaders(self.splits_of("val") or ["val"])

    def test_dataloader(self) -> Any:
        """Return the test texts in their order."""
        return self._loaders(self.splits_of("test") or ["test"])

    def predict_dataloader(self) -> Any:
        """Return the texts to predict in their order, or the test texts if there are none."""
        return self._loaders(_predicted(self.splits) or ["test"])


def _of_kind(kind: str, names: Sequence[str] | dict[str, Any]) -> list[str]:
    return [name for name in names if name == kind or name.startswith(f"{kind}_")]


def _predicted(names: Sequence[str] | dict[str, Any]) -> list[str]:
    return _of_kind("predict", names) or _of_kind("test", names)
