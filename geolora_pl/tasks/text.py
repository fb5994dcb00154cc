"""Define the task of classes, several labels and numbers of texts and pairs, with the models of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from geolora_pl.tasks.classes import (
    check_class_weights,
    make_loss,
    name_classes,
    probabilities,
    problem_type,
    settle_class_names,
    settle_class_weights,
    settle_multi_label,
    settle_num_classes,
    weight_of,
)
from geolora_pl.tasks.confusion import confusion_matrix, keep_confusion
from geolora_pl.tasks.metrics import check_metrics, for_metrics, make_metrics, usual_metrics
from geolora_pl.tasks.text_models import head_names
from geolora_pl.tasks.transformer import Batch, TransformerTask


class TextClassification(TransformerTask):
    """Adapt a pretrained transformer to the classes of a data set, to several labels per text, or to numbers.

    The model is any that ``AutoModelForSequenceClassification`` builds: an encoder, or a decoder with a classification
    head. The head and the pooler before it are trained in full, and a message says how many parameters they have; those
    without pretrained weights are initialised at random. One class means a regression, with the squared error as loss.
    With several labels per text the loss is the binary cross-entropy of every label.

    Args:
        model_name: A name of the hub, a folder, or ``pkg://package/folder``; see :class:`TransformerTask`.
        num_classes: Number of classes, 1 for a regression; by default that of the data module.
        class_weights: Weight of each class in the loss, at least 0, or ``balanced`` for the inverse of its share of
            the training texts (the mean over these texts is 1).
        label_smoothing: Share of the target that is spread over all classes, in [0, 1).
        metrics: Metrics to log, among ``accuracy``, ``f1`` and ``matthews``; ``f1_macro``, ``f1_micro`` and
            ``average_precision`` for several labels; ``pearson``, ``spearman`` and ``mae`` for a regression. By default
            those that the data module names, or all of several labels.
        class_names: Names of the classes; by default those of the data module.
        multi_label: Whether a text may have several labels or none; by default as the data module says.
        train_pooler: Whether the pooler before the head is trained in full; with ``False`` a pooler with pretrained
            weights stays frozen, as in PEFT, and one without weights is refused.
        **kwargs: Arguments of :class:`TransformerTask`.

    Raises:
        ValueError: An argument is out of range, the model is not there or cannot be adapted, or classes, weights,
            metrics or lengths do not fit the data.

    Example:
        >>> tiny = {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> task = TextClassification("tiny", pretrained=False, model_args=tiny, num_classes=3)
        >>> task.configure_model()
        >>> import torch
        >>> task({"input_ids": torch.ones(2, 5, dtype=torch.long)}).shape
        torch.Size([2, 3])
    """

    auto_class = AutoModelForSequenceClassification
    sources = "TextFiles, TextHub or GLUE"

    def __init__(
        self,
        model_name: str,
        num_classes: int | None = None,
        class_weights: list[float] | Literal["balanced"] | None = None,
        label_smoothing: float = 0.0,
        metrics: list[str] | None = None,
        class_names: list[str] | None = None,
        multi_label: bool | None = None,
        train_pooler: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(model_name, **kwargs)
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes={num_classes} must be at least 1")
        check_class_weights(class_weights)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, 1)")
        check_metrics(metrics)
        self.num_classes = num_classes
        self.class_weights = class_weights
        self.label_smoothing = label_smoothing
        self.metric_names = metrics
        self.class_names = class_names
        self.multi_label = multi_label
        self.train_pooler = train_pooler

    def configure_model(self) -> None:
        """Take classes and weights from the data, build the model, put the adapters in, make the loss."""
        if not hasattr(self, "model"):
            self._settle_classes()
        super().configure_model()

    def _settle_classes(self) -> None:
        data = self._data()
        self.num_classes = settle_num_classes(self.num_classes, data)
        self.multi_label = settle_multi_label(self.multi_label, self.num_classes, data)
        if self.num_classes > 1:
            self.class_names = settle_class_names(self.class_names, self.num_classes, data)
        weights: Any = self.class_weights
        if self.num_classes > 1 and not self.multi_label:
            weights = self.class_weights = settle_class_weights(self.class_weights, self.num_classes, data)
        self.loss = make_loss(self.num_classes, self.multi_label, weights, self.label_smoothing)
        # A checkpoint can then be loaded without the data.
        self.hparams["num_classes"], self.hparams["class_weights"] = self.num_classes, self.class_weights
        self.hparams["class_names"], self.hparams["multi_label"] = self.class_names, self.multi_label

    def adjust(self, config: PreTrainedConfig) -> None:
        """Set the number of outputs, and the padding token, by which decoders find the last token of a text."""
        assert self.num_classes is not None
        config.num_labels = self.num_classes
        if self.pretrained or config.pad_token_id is None:
            config.pad_token_id = self.tokenizer.pad_token_id

    def may_be_new(self, model: nn.Module) -> Sequence[str]:
        """Return the names of the head, and of the pooler before it if that is trained."""
        return head_names(model, self.train_pooler)

    def save_model(self, folder: Path) -> None:
        """Write the model and its tokenizer for ``from_pretrained``, with the kind of problem and names of classes."""
        assert isinstance(self.model, PreTrainedModel)
        assert self.num_classes is not None
        self.model.config.problem_type = problem_type(self.num_classes, bool(self.multi_label))
        name_classes(self.model.config, self.class_names)
        super().save_model(folder)

    def setup(self, stage: str) -> None:
        """Make the metrics, one collection per set of texts, and say what is trained in full."""
        super().setup(stage)
        data = self._data()
        classes, several = settle_num_classes(self.num_classes, data), bool(self.multi_label)
        names = self.metric_names or getattr(data, "metrics", None) or usual_metrics(classes, several)
        self.num_classes, self.metric_names = classes, names
        self.hparams["metrics"] = names
        self.make_split_metrics(lambda: make_metrics(names, classes, several))
        self.confusion = confusion_matrix(classes, several)

    def forward(self, batch: Batch) -> Tensor:
        """Return logits (batch, classes), or numbers (batch,) in a regression, of tokens (batch, length)."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits: Tensor = self.model(**inputs).logits
        return logits.squeeze(-1) if self.num_classes == 1 else logits

    def training_step(self, batch: Batch) -> Tensor:
        """Return the cross-entropy, or the squared error in a regression."""
        loss: Tensor = self.loss(self(batch), batch["labels"])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def evaluate(self, split: str, batch: Batch) -> None:
        """Log loss and metrics of a batch of a split."""
        outputs, labels = self(batch), batch["labels"]
        if self.confusion is not None and split == self.val_splits[0]:
            self.confusion.update(outputs, labels)
        of_split = self.metrics[split]
        assert isinstance(of_split, nn.ModuleDict)
        assert self.num_classes is not None
        compared = for_metrics(outputs, labels, self.num_classes, bool(self.multi_label))
        of_loss = self.loss(outputs, labels), weight_of(self.loss, labels)
        self.log_scores(split, {**dict.fromkeys(of_split, compared), "loss": of_loss})

    def on_validation_epoch_end(self) -> None:
        """Keep for the report which classes were taken for which in the first set of texts."""
        keep_confusion(self, self.confusion, self.class_names)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return probabilities of the classes (batch, classes), or numbers (batch,) in a regression."""
        assert self.num_classes is not None
        return probabilities(self(batch), self.num_classes, bool(self.multi_label))
