"""Define the base of the tasks with models of transformers: loading the model, its tokenizer, what is adapted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from geolora_pl.adapters.config import AdapterConfig
from geolora_pl.adapters.quantised import quantised_names
from geolora_pl.adapters.targets import find_modules_to_save
from geolora_pl.lightning.internals import datamodule_of, precision_of
from geolora_pl.lightning.module import GeoLoRAModule
from geolora_pl.notes import keep_notes, note
from geolora_pl.tasks.low_bit import (
    Attention,
    Dtype,
    check_attention,
    check_choice,
    check_quantization,
    dtype_of,
    enable_checkpointing,
    forget_quantization,
    keep_quantization,
    modules_left_plain,
    quantization_config,
    widen,
)
from geolora_pl.tasks.metrics import Mean
from geolora_pl.tasks.text_models import (
    block_linears,
    config_from_checkpoint,
    load_config,
    load_model,
    load_tokenizer,
    plain_config,
    said_by_checkpoint,
    shown,
    skeleton,
    token_limits,
)
from geolora_pl.tasks.trained import note_trained_in_full

Batch = Mapping[str, Tensor]
IGNORED = -100  # the label of a token that is not learnt; cross_entropy leaves it out


class TransformerTask(GeoLoRAModule):
    """The base of the tasks with models of transformers: a subclass says which models, and writes the steps.

    A checkpoint holds the model and its configuration, and loads without data, hub or folder. It does not hold the
    tokenizer, which is loaded from ``model_name`` when texts are tokenized.

    Attributes:
        auto_class: The class that builds the model, such as ``transformers.AutoModelForCausalLM``; a class attribute.
        sources: The data sources of the task, which one of another task is refused with; empty for any. A class
            attribute.

    Args:
        model_name: A name of the hub, the path of a folder that ``save_pretrained`` wrote, or ``pkg://package/folder``
            for a folder inside an installed Python package.
        pretrained: Whether to load the pretrained weights; otherwise they are random.
        model_args: Settings that replace those of the model's configuration, such as ``hidden_dropout_prob``. If
            ``model_type`` is among them, they are the whole configuration, as in a checkpoint.
        dtype: Type of the frozen weights, ``bfloat16``, ``float16``, ``float32`` or ``auto`` for that of the file; by
            default the trainer's precision decides. Adapters and what is trained in full are float32 in any case.
        quantization: How the linear layers are quantised while they are loaded, such as ``{bits: 4}`` (bitsandbytes)
            or ``{bits: 8}`` (torchao), with further settings of that library; what is trained in full is not.
        attn_implementation: How attention is computed, ``eager``, ``sdpa`` or ``flash_attention_2``; by default as
            transformers chooses. A checkpoint does not hold it.
        gradient_checkpointing: Whether the blocks compute their activations twice, which saves memory and costs time.
        adapter: What to adapt; by default (``target_modules: auto``) the linear layers of the transformer's blocks.
        **kwargs: Arguments of :class:`GeoLoRAModule`.
    """

    auto_class: ClassVar[Any]
    sources: ClassVar[str] = ""
    val_splits: Sequence[str]  # set with the metrics, in setup
    metrics: nn.ModuleDict
    base_arguments = MappingProxyType({"pretrained": False})
    locating_arguments = ("model_name",)

    def __init__(
        self,
        model_name: str,
        pretrained: bool = True,
        model_args: dict[str, Any] | None = None,
        dtype: Dtype | None = None,
        quantization: dict[str, Any] | None = None,
        attn_implementation: Attention | None = None,
        gradient_checkpointing: bool = False,
        adapter: AdapterConfig = AdapterConfig(target_modules="auto"),
        **kwargs: Any,
    ) -> None:
        super().__init__(adapter=adapter, **kwargs)
        self.hparams.pop("attn_implementation", None)  # of a machine, and not of what was trained on it
        if dtype is not None:
            check_choice("dtype", dtype, get_args(Dtype))
        if attn_implementation is not None:
            check_choice("attn_implementation", attn_implementation, get_args(Attention))
        if quantization is not None:
            check_quantization(quantization)
        if quantization is not None and not pretrained:
            raise ValueError("quantization is for pretrained weights: set pretrained to true, or leave it out")
        self.weights_dtype = dtype
        self.quantization = quantization
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
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
        if name == "quantization" and value is not None:
            check_quantization(value)
        return super().argument_from_checkpoint(name, value)

    def adjust(self, config: PreTrainedConfig) -> None:
        """Set what the task knows, such as the number of classes, in the model's configuration."""

    def may_be_new(self, model: nn.Module) -> Sequence[str]:
        """Return the names of the modules of a model that need no pretrained weights, such as a new head."""
        return ()

    def new_modules(self) -> Sequence[str]:
        """Return the names of the modules that are trained in full: those that may be new."""
        return self.may_be_new(self.model)

    def setup(self, stage: str) -> None:
        """Say what is trained in full."""
        if stage == "fit" and hasattr(self, "model"):
            with keep_notes(self.notes):
                note_trained_in_full(self.model, self.new_modules())

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
        if self.pretrained and "model_type" in self.model_args:  # a checkpoint does not say how the file holds weights
            keep_quantization(config, load_config(self.model_name, {}))
        self.adjust(config)
        if not self.pretrained:
            config.name_or_path = shown(self.model_name)  # which exports name as their base
        model, new = load_model(
            self.model_name, config, self.pretrained, self.auto_class, self._trusts_code, **self._held(config)
        )
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
        self._hold(model)
        return model

    def _held(self, config: PreTrainedConfig) -> dict[str, Any]:
        """How the weights are held, as arguments of ``from_pretrained``, once it is clear that they can be."""
        held: dict[str, Any] = {}
        dtype = torch.get_default_dtype()
        if self.weights_dtype is not None:
            dtype = held["dtype"] = dtype_of(self.weights_dtype, config)
        if self.weights_dtype is not None or self.quantization is not None:
            self._refuse_conflicts(dtype)
        if self.attn_implementation is not None:
            held["attn_implementation"] = check_attention(self.attn_implementation)
            try:
                skeleton(config, self.auto_class, self._trusts_code, **held)
            except (ImportError, ValueError) as error:
                raise ValueError(
                    f"attn_implementation={self.attn_implementation!r} does not suit {self.model_name}: {error}"
                ) from error
        if self.quantization is not None and getattr(config, "quantization_config", None):
            raise ValueError(f"quantization: the weights of {self.model_name} are quantised already: leave it out")
        if self.quantization is not None:
            plain = skeleton(config, self.auto_class, self._trusts_code)
            trained = [*self.adapter.modules_to_save, *self.may_be_new(plain)]
            left = modules_left_plain(plain, trained, self.quantization)
            held["quantization_config"] = quantization_config(self.quantization, dtype, left)
        return held

    def _refuse_conflicts(self, dtype: torch.dtype) -> None:
        """Refuse other settings with which those of the weights do not go together."""
        if (precision := precision_of(self)) in ("bf16-true", "16-true"):
            raise ValueError(
                f"precision={precision!r} makes all weights 16 bits, those of the head included: leave dtype and "
                "quantization out, or take precision bf16-mixed, with which what is trained stays float32"
            )
        if self.adapter.train_bias and (self.quantization is not None or dtype in (torch.bfloat16, torch.float16)):
            raise ValueError(
                f"train_bias={self.adapter.train_bias!r}: the biases of such a base may be rounded at every step: set "
                "train_bias to false, or leave dtype and quantization out"
            )
        if self.quantization is not None and self.device_mesh is not None:
            raise ValueError("quantization: ModelParallelStrategy cannot shard quantised weights: take strategy ddp")

    def _hold(self, model: PreTrainedModel) -> None:
        """Hold what is trained in float32, whatever the rest is held in, and save memory if that is asked for."""
        if self.weights_dtype is not None:
            self.hparams["dtype"] = str(model.dtype).removeprefix("torch.")  # which "auto" may mean otherwise later
        if model.dtype in (torch.bfloat16, torch.float16) and (self.weights_dtype or self.quantization):
            last = list(self.may_be_new(model))
            saved = find_modules_to_save(model, self.adapter.modules_to_save)
            widen(model, last, None)
            widen(model, [name for name in saved if name not in last], model.dtype)
        if quantised_names(model):
            note(f"{self.model_name} is quantised: checkpoints leave it out, and need it again when they are loaded")
        if self.gradient_checkpointing:
            enable_checkpointing(model)

    def save_model(self, folder: Path) -> None:
        """Write the model and its tokenizer for ``from_pretrained``."""
        assert isinstance(self.model, PreTrainedModel)
        self.tokenizer.save_pretrained(folder)
        forget_quantization(self.model)
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

    def make_split_metrics(self, make: Callable[[], Mapping[str, Metric]]) -> None:
        """Set ``val_splits`` as the data say, and ``metrics``, by their names, for each of them and for ``test``.

        Args:
            make: Makes what is logged of a split beside the mean loss.
        """
        self.val_splits = getattr(self._data(), "splits_of", lambda kind: [kind])("val") or ["val"]
        splits = (*self.val_splits, "test")
        self.metrics = nn.ModuleDict({split: nn.ModuleDict({"loss": Mean(), **make()}) for split in splits})

    def log_scores(self, split: str, scored: Mapping[str, tuple[Any, ...]]) -> None:
        """Take a batch into the metrics of a split and log them.

        Args:
            split: ``test`` or one of ``val_splits``.
            scored: For the name of each metric, the arguments of its ``update``.
        """
        of_split = self.metrics[split]
        assert isinstance(of_split, nn.ModuleDict)
        for name, metric in of_split.items():
            assert isinstance(metric, Metric)
            metric.update(*scored[name])  # calling it would also compute this batch alone, which may be undefined
            self.log(logged_name(split, name), metric, prog_bar=True, add_dataloader_idx=False)

    def _data(self) -> object:
        return datamodule_of(self)


def token_cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each token, and which tokens are learnt.

    Args:
        logits: (batch, length, classes).
        labels: (batch, length), -100 where nothing is learnt.

    Returns:
        Two tensors (batch, length): the losses in float32, zero where nothing is learnt, and the mask.
    """
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(labels), labels != IGNORED


def logged_name(split: str, metric: str) -> str:
    """The name under which a metric of a split is logged.

    Example:
        >>> logged_name("val", "loss"), logged_name("val_mismatched", "loss")
        ('val_loss', 'val_loss_mismatched')
    """
    kind, _, other = split.partition("_")
    return f"{kind}_{metric}_{other}" if other else f"{kind}_{metric}"
