"""Define the base of the tasks with models of transformers: loading the model, its tokenizer, what is adapted."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from geolora_pl.adapters.config import AdapterConfig
from geolora_pl.lightning.internals import datamodule_of
from geolora_pl.lightning.module import GeoLoRAModule
from geolora_pl.notes import keep_notes, note
from geolora_pl.tasks.text_models import (
    block_linears,
    config_from_checkpoint,
    load_config,
    load_model,
    load_tokenizer,
    plain_config,
    said_by_checkpoint,
    shown,
    token_limits,
)

Batch = Mapping[str, Tensor]


class TransformerTask(GeoLoRAModule):
    """The base of the tasks with models of transformers: a subclass says which models, and writes the steps.

    A checkpoint holds the model and its configuration, and loads without data, hub or folder. It does not hold the
    tokenizer, which is loaded from ``model_name`` when texts are tokenized.

    Attributes:
        auto_class: The class that builds the model, such as ``transformers.AutoModelForCausalLM``; a class attribute.

    Args:
        model_name: A name of the hub, the path of a folder that ``save_pretrained`` wrote, or ``pkg://package/folder``
            for a folder inside an installed Python package.
        pretrained: Whether to load the pretrained weights; otherwise they are random.
        model_args: Settings that replace those of the model's configuration, such as ``hidden_dropout_prob``. If
            ``model_type`` is among them, they are the whole configuration, as in a checkpoint.
        adapter: What to adapt; by default (``target_modules: auto``) the linear layers of the transformer's blocks.
        **kwargs: Arguments of :class:`GeoLoRAModule`.
    """

    auto_class: ClassVar[Any]
    val_splits: Sequence[str]  # set with the metrics, in setup
    base_arguments = MappingProxyType({"pretrained": False})
    locating_arguments = ("model_name",)

    def __init__(
        self,
        model_name: str,
        pretrained: bool = True,
        model_args: dict[str, Any] | None = None,
        adapter: AdapterConfig = AdapterConfig(target_modules="auto"),
        **kwargs: Any,
    ) -> None:
        super().__init__(adapter=adapter, **kwargs)
        self.model_name = model_name
        self.pretrained = pretrained
        self.model_args = model_args or {}
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self.notes: list[str] = []  # what the user is told about the model

    @classmethod
    def argument_from_checkpoint(cls, name: str, value: Any) -> Any:
        """Accept a whole configuration without code or places; a name of the hub is kept but never used.

        Raises:
            ValueError: The checkpoint says more, or its configuration is incomplete.
        """
        if name == "model_args":
            value = config_from_checkpoint(value)
        if name == "model_name":
            return said_by_checkpoint(value)
        return super().argument_from_checkpoint(name, value)

    def adjust(self, config: PreTrainedConfig) -> None:
        """Set what the task knows, such as the number of classes, in the model's configuration."""

    def may_be_new(self, model: nn.Module) -> Sequence[str]:
        """Return the names of the modules of a model that need no pretrained weights, such as a new head."""
        return ()

    def configure_model(self) -> None:
        """Build the model and put the adapters in; what is said about it is kept."""
        with keep_notes(self.notes):
            super().configure_model()

    def build_model(self) -> nn.Module:
        """Load the model.

        Raises:
            ValueError: The model cannot be loaded, or has no weights for a module that is not new.
        """
        config = load_config(self.model_name, self.model_args)
        self.adjust(config)
        if not self.pretrained:
            config.name_or_path = shown(self.model_name)  # which exports name as their base
        model, new = load_model(self.model_name, config, self.pretrained, self.auto_class, self._trusts_code)
        heads = self.may_be_new(model)
        if absent := [name for name in new if not any(f"{name}.".startswith(f"{head}.") for head in heads)]:
            frozen = "; set train_pooler to true if the pooler is new" if "pooler" in absent[0] else ""
            raise ValueError(
                f"model_name={self.model_name!r} has no fitting weights for {absent[0]} ({len(absent)} modules in "
                f"all): they belong to another model than {config.model_type}, or model_args changed its size{frozen}"
            )
        if new:
            note(f"{self.model_name} has no weights for {', '.join(new)}: they are initialised at random")
        # From now on the checkpoints hold the weights, and must load without the folder and without the hub.
        self.hparams["pretrained"], self.hparams["model_args"] = False, plain_config(config)
        return model

    def save_model(self, folder: Path) -> None:
        """Write the model and its tokenizer for ``from_pretrained``."""
        assert isinstance(self.model, PreTrainedModel)
        self.tokenizer.save_pretrained(folder)
        weights, seen = self.model.state_dict(), set()
        for name, tensor in weights.items():
            # What the class of the model does not declare as tied must have a storage of its own in the file.
            if tensor.data_ptr() in seen and name not in self.model.all_tied_weights_keys:
                weights[name] = tensor.clone()
            seen.add(tensor.data_ptr())
        self.model.save_pretrained(folder, state_dict=weights)

    def default_targets(self) -> str | Sequence[str]:
        """Return the linear layers of the transformer's blocks, or every linear layer if there are no such blocks."""
        if names := block_linears(self.model):
            return names
        note(f"{self.model_name} has no numbered blocks: every linear layer but the head is adapted")
        return super().default_targets()

    @property
    def _trusts_code(self) -> bool:
        """Whether the user allows the model's own code by ``model_args``; a checkpoint cannot allow it."""
        return bool(self.model_args.get("trust_remote_code"))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own tokenizer, with a padding token and the model's limit as ``model_max_length``."""
        if self._tokenizer is None:
            config = load_config(self.model_name, self.model_args)
            tokenizer = load_tokenizer(self.model_name, config, self._trusts_code)
            if self.max_positions is not None:
                tokenizer.model_max_length = min(tokenizer.model_max_length, self.max_positions)
            if self.num_tokens is not None and tokenizer.pad_token_id >= self.num_tokens:
                raise ValueError(
                    f"model_name={self.model_name!r}: the tokenizer pads with the id {tokenizer.pad_token_id}, but the "
                    f"model has embeddings for the ids 0 to {self.num_tokens - 1} only: set another pad_token, or "
                    "resize the embeddings and save the model"
                )
            self._tokenizer = tokenizer
        return self._tokenizer

    @cached_property
    def _token_limits(self) -> tuple[int | None, int | None]:
        config = load_config(self.model_name, self.model_args)
        return token_limits(config, self.auto_class, self._trusts_code)

    @property
    def max_positions(self) -> int | None:
        """The number of tokens that the model has positions for, or ``None`` if its positions are relative."""
        return self._token_limits[0]

    @property
    def num_tokens(self) -> int | None:
        """The number of tokens that the model has embeddings for, or ``None`` if it has no table of them."""
        return self._token_limits[1]

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Evaluate on the validation texts; the logged names of a further set end with its name."""
        self.evaluate(self.val_splits[dataloader_idx], batch)

    def test_step(self, batch: Batch) -> None:
        """Evaluate on the test texts."""
        self.evaluate("test", batch)

    def evaluate(self, split: str, batch: Batch) -> None:
        """Log loss and metrics of a batch of a split, ``test`` or one of ``val_splits``."""
        raise NotImplementedError(f"{type(self).__name__} must evaluate")

    def _data(self) -> object:
        return datamodule_of(self)


def check_source(
    task: object,
    data: object,
    columns: Collection[str],
    take: str,
    kinds: Sequence[str] = ("train", "val", "test", "predict"),
) -> None:
    """Refuse texts that were tokenized for another task.

    Args:
        task: The task.
        data: The data module; one that does not say what its splits hold is taken as it is.
        columns: Those of which every split has one.
        take: The sources that have them.
        kinds: The kinds of splits that must have them.

    Raises:
        ValueError: A split has none of the columns.
    """
    for name, tokens in getattr(data, "splits", {}).items():
        there = getattr(tokens, "column_names", columns)
        if name.partition("_")[0] in kinds and not set(columns) & set(there):
            raise ValueError(f"{type(data).__name__} does not make what {type(task).__name__} learns from: take {take}")
