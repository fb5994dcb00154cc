"""Define the task of causal language modelling with the decoders of transformers."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from geolora_pl.tasks.transformer import Batch, TransformerTask

IGNORED = -100  # the label of a token that is not learnt; cross_entropy leaves it out


class CausalLM(TransformerTask):
    r"""Adapt a pretrained decoder to texts, or to completions of prompts.

    The loss is the mean over the learnt tokens of :math:`-\log p(x_t \mid x_{<t})`, in nats; a label of -100 means a
    token that is not learnt. In an evaluation by one process every token counts once, whatever batch it is in, and the
    perplexity is the exponential of that mean. Several processes get equally many texts, so that a few count twice.

    The model is any that ``AutoModelForCausalLM`` builds. Only the adapters are trained, by default those of the linear
    layers of the blocks; embeddings and ``lm_head`` are frozen, whether they are tied or not.

    The arguments are those of :class:`TransformerTask`.

    Raises:
        ValueError: An argument is out of range, or the model is not there or cannot be adapted.

    Example:
        >>> import torch
        >>> tiny = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> tiny |= {"intermediate_size": 8, "vocab_size": 11}
        >>> task = CausalLM("tiny", pretrained=False, model_args=tiny)
        >>> task.configure_model()
        >>> task({"input_ids": torch.ones(2, 5, dtype=torch.long)}).shape
        torch.Size([2, 5, 11])
    """

    auto_class = AutoModelForCausalLM

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own tokenizer, which pads on the right so that positions count from the first token."""
        tokenizer = super().tokenizer
        tokenizer.padding_side = "right"
        return tokenizer

    def setup(self, stage: str) -> None:
        """Make the metrics, loss and perplexity per set of texts."""
        self.val_splits = getattr(self._data(), "splits_of", lambda kind: [kind])("val") or ["val"]
        self.metrics = nn.ModuleDict(
            {
                split: nn.ModuleDict({"loss": MeanMetric(), "perplexity": Perplexity()})
                for split in (*self.val_splits, "test")
            }
        )

    def forward(self, batch: Batch) -> Tensor:
        """Return logits (batch, length, vocabulary) of tokens (batch, length)."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits: Tensor = self.model(**inputs, use_cache=False).logits
        return logits

    def token_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss of predicting the successor of each token, and which successors are learnt.

        Returns:
            Two tensors (batch, length): the losses in float32, zero where nothing is learnt, and the mask.
        """
        logits = self(batch)
        successors = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)  # labels are smaller than logits to shift
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), successors.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return losses.view_as(successors), successors != IGNORED

    def training_step(self, batch: Batch) -> Tensor:
        """Return the mean loss of the learnt tokens of the batch, or zero if there are none."""
        losses, learnt = self.token_losses(batch)
        loss = losses.sum() / learnt.sum().clamp_min(1)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def evaluate(self, split: str, batch: Batch) -> None:
        """Log loss and perplexity of a batch of a split."""
        losses, learnt = self.token_losses(batch)
        kind, _, other = split.partition("_")  # val_other
        end = f"_{other}" if other else ""
        of_split = self.metrics[split]
        assert isinstance(of_split, nn.ModuleDict)
        for name, metric in of_split.items():
            assert isinstance(metric, MeanMetric)
            metric.update(losses, learnt)
            self.log(f"{kind}_{name}{end}", metric, prog_bar=True, add_dataloader_idx=False)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return the mean loss of each sequence's learnt tokens, in nats (batch,)."""
        losses, learnt = self.token_losses(batch)
        return losses.sum(1) / learnt.sum(1).clamp_min(1)


class Perplexity(MeanMetric):
    """The exponential of a weighted mean of losses in nats.

    The perplexity of torchmetrics uses probabilities, which underflow to zero in float32 for very unlikely tokens.

    Example:
        >>> import torch
        >>> perplexity = Perplexity()
        >>> perplexity.update(torch.tensor([0.0, 2.0, 7.0]), torch.tensor([1, 1, 0]))
        >>> round(perplexity.compute().item(), 4)
        2.7183
    """

    def compute(self) -> Tensor:
        """Return the exponential of the mean."""
        return super().compute().exp()
