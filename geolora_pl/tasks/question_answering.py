"""Define the task of extractive question answering: the part of a context that answers a question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.text import squad
from transformers import AutoModelForQuestionAnswering, PreTrainedConfig, PreTrainedTokenizerBase

from geolora_pl.tasks.metrics import Mean
from geolora_pl.tasks.text_models import head_names
from geolora_pl.tasks.transformer import Batch, TransformerTask

_INPUTS = ("input_ids", "token_type_ids", "attention_mask")
_METRICS = ("exact_match", "f1")


class QuestionAnswering(TransformerTask):
    """Adapt a pretrained transformer to find the answer of a question in a context.

    The loss of a piece of a context is the mean cross-entropy of the first and the last token of the answer. The head
    is trained in full. Predicted is the span, among those of all pieces of the context, with the largest product of the
    probabilities that its piece gives to its first and last token. Logged are the exact match and the F1 of words, as
    SQuAD defines them, between 0 and 1.

    Args:
        model_name: A name of the hub, a folder, or ``pkg://package/folder``; see :class:`TransformerTask`.
        max_answer_length: Number of tokens of the longest answer that is predicted, at least 1.
        unanswerable: Whether a question may have no answer, which is then predicted where every piece finds it more
            probable than the best span; by default as the data are.
        **kwargs: Arguments of :class:`TransformerTask`.

    Raises:
        ValueError: An argument is out of range, or the model is not there or cannot be adapted.

    Example:
        >>> tiny = {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> task = QuestionAnswering("tiny", pretrained=False, model_args=tiny)
        >>> task.configure_model()
        >>> task({"input_ids": torch.ones(2, 5, dtype=torch.long)}).shape
        torch.Size([2, 5, 2])
    """

    auto_class = AutoModelForQuestionAnswering
    sources = "AnswerFiles or AnswerHub"

    def __init__(
        self, model_name: str, max_answer_length: int = 30, unanswerable: bool | None = None, **kwargs: Any
    ) -> None:
        super().__init__(model_name, **kwargs)
        if max_answer_length < 1:
            raise ValueError(f"max_answer_length={max_answer_length} must be at least 1")
        self.max_answer_length = max_answer_length
        self.unanswerable = unanswerable

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own tokenizer, which cuts on the right, so that a cut question keeps its beginning."""
        tokenizer = super().tokenizer
        tokenizer.truncation_side = "right"
        return tokenizer

    def adjust(self, config: PreTrainedConfig) -> None:
        """Set the number of outputs: the first and the last token."""
        config.num_labels = 2

    def may_be_new(self, model: nn.Module) -> Sequence[str]:
        """Return the names of the head, and of a pooler, which is not called."""
        return head_names(model)

    def new_modules(self) -> Sequence[str]:
        """Return the names of the head."""
        return head_names(self.model, pooler=False)

    def setup(self, stage: str) -> None:
        """Make the metrics, one collection per set of questions, and say what is trained in full."""
        super().setup(stage)
        data = self._data()
        if self.unanswerable is None:
            self.unanswerable = bool(getattr(data, "unanswerable", False))
            self.hparams["unanswerable"] = self.unanswerable
        self.make_split_metrics(lambda: {name: Mean() for name in _METRICS})

    def forward(self, batch: Batch) -> Tensor:
        """Return logits (pieces, length, 2) for the first and the last token of the answer."""
        outputs = self.model(**{name: tensor for name, tensor in batch.items() if name in _INPUTS})
        return torch.stack([outputs.start_logits, outputs.end_logits], -1)

    def log_probabilities(self, batch: Batch) -> Tensor:
        """Return the logarithms of the probabilities (pieces, length, 2) of first and last token, without padding."""
        padding = (batch["attention_mask"] == 0)[..., None]
        found: Tensor = self(batch).float().masked_fill(padding, float("-inf")).log_softmax(1)
        return found

    def training_step(self, batch: Batch) -> Tensor:
        """Return the mean loss of the pieces."""
        loss = _losses(self.log_probabilities(batch), batch).mean()
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def evaluate(self, split: str, batch: Mapping[str, Any]) -> None:
        """Log loss and metrics of a batch of questions of a split."""
        found = self.log_probabilities(batch)
        rows = self.answers(found, batch)
        predicted: Any = [{"id": str(number), "prediction_text": row["answer"]} for number, row in enumerate(rows)]
        targets: Any = [
            {"id": str(number), "answers": {"text": texts or [""], "answer_start": [0] * max(1, len(texts))}}
            for number, texts in enumerate(batch["answers"])
        ]
        scores = {name: (float(score) / 100, len(rows)) for name, score in squad(predicted, targets).items()}
        self.log_scores(split, {"loss": (_losses(found, batch),), **scores})

    def answers(self, found: Tensor, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the best answer to each question of a batch over all pieces of its context.

        Args:
            found: The logarithms of the probabilities (pieces, length, 2).
            batch: The pieces, their questions and the contexts.

        Returns:
            For each question its ``answer``, the character at which it ``start``s, and its ``score``, a probability. No
            answer is an empty text without a start.
        """
        begins, longest = batch["begins"], self.max_answer_length
        inside = found.masked_fill((begins < 0)[..., None], float("-inf"))
        last_tokens = F.pad(inside[..., 1], (0, longest - 1), value=float("-inf")).unfold(1, longest, 1)
        spans = inside[..., :1] + last_tokens  # (pieces, length, longest): by the first token and how many follow it
        best, index = spans.flatten(1).max(1)
        pieces = torch.arange(len(found), device=found.device)
        first, last = index // longest, index // longest + index % longest
        # Where no token is of the context, the last one may lie beyond the end.
        ends = batch["ends"][pieces, last.clamp_max(begins.shape[1] - 1)].tolist()
        starts = begins[pieces, first].tolist()
        null = found[pieces, batch["null"]].sum(-1)
        scores, nulls, questions = best.tolist(), null.tolist(), batch["question"].tolist()
        rows: list[dict[str, Any]] = []
        for number, context in enumerate(batch["context"]):
            mine = [piece for piece, question in enumerate(questions) if question == number]
            piece = max(mine, key=lambda piece: scores[piece])
            nothing = min(nulls[piece] for piece in mine)
            if scores[piece] == float("-inf") or (self.unanswerable and nothing > scores[piece]):
                rows.append({"answer": "", "start": None, "score": _probability(nothing)})
                continue
            text = context[starts[piece] : ends[piece]]
            start = starts[piece] + len(text) - len(text.lstrip())  # a token may begin with the space before it
            rows.append({"answer": text.strip(), "start": start, "score": _probability(scores[piece])})
        return rows

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Return the answer to each question."""
        return self.answers(self.log_probabilities(batch), batch)


def _losses(found: Tensor, batch: Batch) -> Tensor:
    """The loss of each piece (pieces,)."""
    of_first = F.nll_loss(found[..., 0], batch["start_positions"], reduction="none")
    of_last = F.nll_loss(found[..., 1], batch["end_positions"], reduction="none")
    return (of_first + of_last) / 2


def _probability(logarithm: float) -> float:
    return float(torch.tensor(logarithm).exp())
