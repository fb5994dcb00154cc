"""Define the task of token classification: a tag for each word, with the models of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoModelForTokenClassification, PreTrainedConfig, PreTrainedModel

from geolora_pl.tasks.classes import name_classes, settle_class_names, settle_num_classes
from geolora_pl.tasks.spans import EntityScore, name_entities
from geolora_pl.tasks.text_models import head_names
from geolora_pl.tasks.transformer import IGNORED, Batch, TransformerTask, token_cross_entropy

NOT_INPUTS = ("labels", "words", "word_count")


class TokenClassification(TransformerTask):
    """Adapt a pretrained transformer to tags of words, such as those of entities or parts of speech.

    The tag of a word is that of its first piece. The loss is the mean cross-entropy over the words. The head is trained
    in full. Logged are the accuracy over the words and, where the tags are those of entities (BIO, BIOES, BILOU), the
    F1 of whole entities.

    Args:
        model_name: A name of the hub, a folder, or ``pkg://package/folder``; see :class:`TransformerTask`.
        num_classes: Number of tags; by default that of the data module.
        class_names: The tags; by default those of the data module.
        **kwargs: Arguments of :class:`TransformerTask`.

    Raises:
        ValueError: An argument is out of range, the model is not there or cannot be adapted, or the tags do not fit
            the data.

    Example:
        >>> import torch
        >>> tiny = {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> task = TokenClassification("tiny", pretrained=False, model_args=tiny, num_classes=3)
        >>> task.configure_model()
        >>> task({"input_ids": torch.ones(2, 5, dtype=torch.long)}).shape
        torch.Size([2, 5, 3])
    """

    auto_class = AutoModelForTokenClassification
    sources = "TagFiles or TagHub"

    def __init__(
        self, model_name: str, num_classes: int | None = None, class_names: list[str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(model_name, **kwargs)
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"num_classes={num_classes} must be at least 2")
        self.num_classes = num_classes
        self.class_names = class_names

    def configure_model(self) -> None:
        """Take the tags from the data, build the model, put the adapters in."""
        if not hasattr(self, "model"):
            data = self._data()
            self.num_classes = settle_num_classes(self.num_classes, data)
            self.class_names = settle_class_names(self.class_names, self.num_classes, data)
            # A checkpoint can then be loaded without the data.
            self.hparams["num_classes"], self.hparams["class_names"] = self.num_classes, self.class_names
        super().configure_model()

    def adjust(self, config: PreTrainedConfig) -> None:
        """Set the number of outputs."""
        assert self.num_classes is not None
        config.num_labels = self.num_classes

    def may_be_new(self, model: nn.Module) -> Sequence[str]:
        """Return the names of the head, and of a pooler, which is not called."""
        return head_names(model)

    def new_modules(self) -> Sequence[str]:
        """Return the names of the head."""
        return head_names(self.model, pooler=False)

    def save_model(self, folder: Path) -> None:
        """Write the model and its tokenizer for ``from_pretrained``, with the tags."""
        assert isinstance(self.model, PreTrainedModel)
        name_classes(self.model.config, self.class_names)
        super().save_model(folder)

    def setup(self, stage: str) -> None:
        """Make the metrics, one collection per set of sentences, and say what is trained in full."""
        super().setup(stage)
        data = self._data()
        self.num_classes = settle_num_classes(self.num_classes, data)
        self.class_names = settle_class_names(self.class_names, self.num_classes, data)
        self.make_split_metrics(self._make_metrics)

    def _make_metrics(self) -> dict[str, Metric]:
        assert self.num_classes is not None
        accuracy = MulticlassAccuracy(self.num_classes, average="micro", ignore_index=IGNORED)
        return {"accuracy": accuracy, "f1": EntityScore()} if self._has_entities else {"accuracy": accuracy}

    @property
    def _has_entities(self) -> bool:
        return name_entities(self.class_names or ())

    def forward(self, batch: Batch) -> Tensor:
        """Return logits (batch, length, tags) of tokens (batch, length)."""
        logits: Tensor = self.model(**{name: tensor for name, tensor in batch.items() if name not in NOT_INPUTS}).logits
        return logits

    def training_step(self, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of the words of the batch, or zero if there are none."""
        logits, labels = self(batch), batch["labels"]
        losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
        loss: Tensor = losses / (labels != IGNORED).sum().clamp_min(1)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def evaluate(self, split: str, batch: Batch) -> None:
        """Log loss and metrics of a batch of a split."""
        logits, labels = self(batch), batch["labels"]
        predictions, (losses, is_word) = logits.argmax(-1), token_cross_entropy(logits, labels)
        scored: dict[str, tuple[Any, ...]] = {"loss": (losses, is_word), "accuracy": (predictions, labels)}
        if self._has_entities:
            scored["f1"] = (self._named(predictions, is_word), self._named(labels, is_word))
        self.log_scores(split, scored)

    def _named(self, classes: Tensor, is_word: Tensor) -> list[list[str]]:
        names = self.class_names
        assert names is not None
        rows = zip(classes.tolist(), is_word.tolist(), strict=True)
        return [[names[index] for index, word in zip(*row, strict=True) if word] for row in rows]

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Return tags and their probabilities per sentence: a list each, with ``None`` for a word that was cut off."""
        scores, classes = self(batch).float().softmax(-1).max(-1)
        names = self.class_names or [str(index) for index in range(classes.max() + 1)]
        rows = []
        columns = (batch["word_count"], batch["words"], classes, scores)
        for count, words, of_row, how_likely in zip(*(column.tolist() for column in columns), strict=True):
            tags, probabilities = [None] * count, [None] * count
            for word, index, score in zip(words, of_row, how_likely, strict=True):
                if word >= 0:
                    tags[word], probabilities[word] = names[index], score
            rows.append({"tags": tags, "scores": probabilities})
        return rows
