"""Classification of texts and pairs of texts, and regression on them, with the models of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics import Metric
from transformers import PreTrainedTokenizerBase

from geolora_pl.config import AdapterConfig
from geolora_pl.module import GeoLoRAModule
from geolora_pl.tasks.classes import check_class_weights, settle_class_weights, settle_num_classes
from geolora_pl.tasks.text_metrics import METRICS, make_metrics, usual_metrics
from geolora_pl.tasks.text_models import (
    block_linears,
    head_names,
    load_config,
    load_model,
    load_tokenizer,
    plain_config,
    position_limit,
)

Batch = Mapping[str, Tensor]


class TextClassification(GeoLoRAModule):
    """Adapt a pretrained transformer to the classes of a data set, or to numbers.

    Any model that ``AutoModelForSequenceClassification`` builds: encoders, and decoders with a classification head.
    The head, and the pooler before it, are trained in full; what of them has no pretrained weights is initialised
    at random. One class means a regression, with the squared error as loss.

    A checkpoint holds the model and its configuration, and is loaded without data, hub or folder. It does not hold the
    tokenizer, which comes from ``model_name`` when texts are tokenized.

    Args:
        model_name: A name of the hub, the path of a folder that ``save_pretrained`` wrote, or ``pkg://package/folder``
            for a folder inside an installed Python package.
        pretrained: Whether to load the pretrained weights; without them they are random.
        model_args: Settings of the model's configuration to replace, such as ``hidden_dropout_prob``; with
            ``model_type`` among them they are the whole configuration, as in a checkpoint.
        num_classes: Number of classes, 1 for a regression; by default that of the data module.
        class_weights: Weight of each class in the loss, at least 0, or ``balanced`` for the inverse of its share of
            the training texts (1 on average over those).
        label_smoothing: Part of the target spread over all classes, in [0, 1).
        metrics: What to log of ``accuracy``, ``f1``, ``matthews``, ``pearson`` and ``spearman``; by default what the
            data module names.
        adapter: What to adapt; by default (``target_modules: auto``) the linear layers of the transformer's blocks.
        **kwargs: Arguments of :class:`GeoLoRAModule`.

    Raises:
        ValueError: An argument is out of range, the model is not there or cannot be adapted, or classes, weights,
            metrics or lengths do not fit the data.

    Example:
        >>> tiny = {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> task = TextClassification("tiny", pretrained=False, model_args=tiny, num_classes=3)
        >>> task.configure_model()
        >>> task({"input_ids": torch.ones(2, 5, dtype=torch.long)}).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        model_name: str,
        pretrained: bool = True,
        model_args: dict[str, Any] | None = None,
        num_classes: int | None = None,
        class_weights: list[float] | Literal["balanced"] | None = None,
        label_smoothing: float = 0.0,
        metrics: list[str] | None = None,
        adapter: AdapterConfig = AdapterConfig(target_modules="auto"),
        **kwargs: Any,
    ) -> None:
        super().__init__(adapter=adapter, **kwargs)
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes={num_classes} must be at least 1")
        check_class_weights(class_weights)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, 1)")
        if unknown := [name for name in metrics or () if name not in METRICS]:
            raise ValueError(f"metrics={unknown!r} are not known: choose among {', '.join(METRICS)}")
        self.model_name = model_name
        self.pretrained = pretrained
        self.model_args = model_args or {}
        self.num_classes = num_classes
        self.class_weights = class_weights
        self.label_smoothing = label_smoothing
        self.metric_names = metrics
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def configure_model(self) -> None:
        """Take classes and weights from the data, build the model, put the adapters in, make the loss."""
        if not hasattr(self, "model"):
            self._settle_classes()
        super().configure_model()

    def _settle_classes(self) -> None:
        data = self._data()
        self.num_classes = settle_num_classes(self.num_classes, data)
        if self.num_classes == 1:
            if self.class_weights is not None or self.label_smoothing:
                raise ValueError("class_weights and label_smoothing are for classes, and this is a regression")
            self.loss: nn.Module = nn.MSELoss()
        else:
            self.class_weights = settle_class_weights(self.class_weights, self.num_classes, data)
            weight = None if self.class_weights is None else torch.tensor(self.class_weights)
            self.loss = nn.CrossEntropyLoss(weight=weight, label_smoothing=self.label_smoothing)
        # So that a checkpoint can be loaded without the data.
        self.hparams["num_classes"], self.hparams["class_weights"] = self.num_classes, self.class_weights

    def _data(self) -> object:
        return getattr(self._trainer, "datamodule", None)

    def build_model(self) -> nn.Module:
        """Load the model with a head for these classes."""
        config = load_config(self.model_name, self.model_args)
        assert self.num_classes is not None
        config.num_labels = self.num_classes
        if self.pretrained or config.pad_token_id is None:  # decoders find the last token of a text by it
            config.pad_token_id = self.tokenizer.pad_token_id
        model, new = load_model(self.model_name, config, self.pretrained)
        if new:
            rank_zero_info(f"{self.model_name} has no weights for {', '.join(new)}: initialised at random")
        # From now on the weights are in the checkpoints, which must load where neither folder nor hub is at hand.
        self.hparams["pretrained"], self.hparams["model_args"] = False, plain_config(config)
        return model

    def new_modules(self) -> Sequence[str]:
        """The head, and the pooler before it."""
        return head_names(self.model)

    def default_targets(self) -> str | Sequence[str]:
        """The linear layers of the transformer's blocks; every linear layer of a model that has no such blocks."""
        if names := block_linears(self.model):
            return names
        rank_zero_info(f"{self.model_name} has no numbered blocks: every linear layer but the head is adapted")
        return super().default_targets()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own tokenizer, with a padding token and the model's limit as ``model_max_length``."""
        if self._tokenizer is None:
            tokenizer = load_tokenizer(self.model_name, load_config(self.model_name, self.model_args))
            if self.max_positions is not None:
                tokenizer.model_max_length = min(tokenizer.model_max_length, self.max_positions)
            self._tokenizer = tokenizer
        return self._tokenizer

    @cached_property
    def max_positions(self) -> int | None:
        """Tokens that the model has positions for; ``None`` if its positions are relative."""
        return position_limit(load_config(self.model_name, self.model_args))

    def setup(self, stage: str) -> None:
        """Make the metrics, a set for every set of texts."""
        data = self._data()
        self.num_classes = settle_num_classes(self.num_classes, data)
        of_data = getattr(data, "metrics", None)
        self.metric_names = self.metric_names or of_data or usual_metrics(self.num_classes)
        self.hparams["metrics"] = self.metric_names
        splits_of = getattr(data, "splits_of", lambda kind: [kind])
        self.val_splits = splits_of("val") or ["val"]
        self.metrics = nn.ModuleDict(
            {split: make_metrics(self.metric_names, self.num_classes) for split in (*self.val_splits, "test")}
        )

    def forward(self, batch: Batch) -> Tensor:
        """Logits (batch, classes), or numbers (batch,) in a regression, of tokens (batch, length)."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits: Tensor = self.model(**inputs).logits
        return logits.squeeze(-1) if self.num_classes == 1 else logits

    def training_step(self, batch: Batch) -> Tensor:
        """The cross-entropy, or the squared error."""
        loss: Tensor = self.loss(self(batch), batch["labels"])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Loss and metrics on the validation texts; of a further set with its name at the end of theirs."""
        self._evaluate(self.val_splits[dataloader_idx], batch)

    def test_step(self, batch: Batch) -> None:
        """Loss and metrics on the test texts."""
        self._evaluate("test", batch)

    def _evaluate(self, split: str, batch: Batch) -> None:
        outputs, labels = self(batch), batch["labels"]
        predictions = outputs.float() if self.num_classes == 1 else outputs.argmax(-1)
        kind, _, other = split.partition("_")  # val_mismatched
        end = f"_{other}" if other else ""
        loss = self.loss(outputs, labels)
        self.log(f"{kind}_loss{end}", loss, batch_size=len(labels), sync_dist=True, add_dataloader_idx=False)
        of_split = self.metrics[split]
        assert isinstance(of_split, nn.ModuleDict)
        for name, metric in of_split.items():
            assert isinstance(metric, Metric)
            metric.update(predictions, labels)  # and no value of this batch alone, as a call makes: it may be undefined
            self.log(f"{kind}_{name}{end}", metric, prog_bar=True, add_dataloader_idx=False)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Probabilities of the classes (batch, classes), or numbers (batch,)."""
        outputs: Tensor = self(batch)
        return outputs if self.num_classes == 1 else outputs.softmax(-1)
