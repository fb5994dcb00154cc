"""Define the task of causal language modelling with the decoders of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils.generic import is_flash_attention_requested

from geolora_pl.tasks.answers import answer, encode_asked, end_at, show_answers, start_answers
from geolora_pl.tasks.chat_template import read_template, template_from_checkpoint
from geolora_pl.tasks.metrics import Perplexity
from geolora_pl.tasks.packing import check_isolation
from geolora_pl.tasks.transformer import IGNORED, Batch, TransformerTask, token_cross_entropy


class CausalLM(TransformerTask):
    r"""Adapt a pretrained decoder to texts, to completions of prompts, or to conversations.

    The loss is the mean over the learnt tokens of :math:`-\log p(x_t \mid x_{<t})`, in nats; a label of -100 means a
    token that is not learnt. In an evaluation by one process every token counts once, whatever batch it is in, and the
    perplexity is the exponential of that mean. Several processes get equally many texts, so that a few count twice.

    The model is any that ``AutoModelForCausalLM`` builds. Only the adapters are trained, by default those of the linear
    layers of the blocks; embeddings and ``lm_head`` are frozen, whether they are tied or not.

    After each validation it can write what it makes of a few prompts to the folder of the run (``generated.jsonl``) and
    to TensorBoard. It takes the likeliest token each time, so that the run is the same without. With conversations, a
    prompt is what a user says, and ``predict`` gives the answers.

    Args:
        model_name: A name of the hub, a folder, or ``pkg://package/folder``; see :class:`TransformerTask`.
        chat_template: A file with a Jinja template that writes conversations, for a model whose tokenizer has none, or
            another one.
        prompts: What it shall go on with, or answer, after each validation.
        max_new_tokens: The largest number of tokens that it writes each time, at least 1.
        **kwargs: Arguments of :class:`TransformerTask`.

    Raises:
        ValueError: An argument is out of range, the model is not there or cannot be adapted, or it cannot keep apart
            the texts that the data module puts into one sequence.

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
    sources = "LanguageFiles, LanguageHub, ChatFiles or ChatHub"

    def __init__(
        self,
        model_name: str,
        chat_template: str | None = None,
        prompts: list[str] | None = None,
        max_new_tokens: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(model_name, **kwargs)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
        if any(not prompt.strip() for prompt in prompts or ()):
            raise ValueError(f"prompts={prompts!r}: one is empty, and there is nothing to go on with: remove it")
        self.chat_template = read_template(chat_template)
        self.prompts = prompts or []
        self.max_new_tokens = max_new_tokens
        self._is_checked = False  # whether the model keeps texts of one sequence apart
        self.hparams["chat_template"] = self.chat_template  # so that an export needs no file but the checkpoint

    @classmethod
    def argument_from_checkpoint(cls, name: str, value: Any) -> Any:
        """Accept a chat template itself, and never a file of this machine.

        Raises:
            ValueError: It is something else, or another argument is refused.
        """
        value = super().argument_from_checkpoint(name, value)
        return template_from_checkpoint(value) if name == "chat_template" else value

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own tokenizer, which pads on the right so that positions count from the first token."""
        tokenizer = super().tokenizer
        tokenizer.padding_side = "right"
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template
        return tokenizer

    def save_model(self, folder: Path) -> None:
        """Write the model and its tokenizer for ``from_pretrained``; it knows the token that ends an answer."""
        end_at(self.model, self.tokenizer)
        super().save_model(folder)

    def setup(self, stage: str) -> None:
        """Make the metrics, loss and perplexity per set of texts."""
        super().setup(stage)
        self.make_split_metrics(lambda: {"perplexity": Perplexity()})

    def on_fit_start(self) -> None:
        """Refuse a model that sees the neighbours of a text, and prompts that are too long."""
        self._check_isolation()
        if self.prompts:
            self._room(self._asked()["input_ids"].shape[1])

    def on_train_start(self) -> None:
        """Remove what another run has written in the folder of this one."""
        if self.prompts:
            start_answers(self.trainer)

    def on_validation_start(self) -> None:
        """Refuse a model that sees the neighbours of a text."""
        self._check_isolation()

    def on_test_start(self) -> None:
        """Refuse a model that sees the neighbours of a text."""
        self._check_isolation()

    def _check_isolation(self) -> None:
        if self._is_checked or not getattr(self._data(), "isolated", False):
            return
        with self.trainer.precision_plugin.forward_context():
            check_isolation(self.model, self, self.num_tokens or 2, self.device)
        self._is_checked = True

    def forward(self, batch: Batch) -> Tensor:
        """Return logits (batch, length, vocabulary) of tokens (batch, length).

        Where ``position_ids`` restart, a text begins that sees nothing before it. The models of transformers find that
        out themselves, flash attention in a batch of one row alone, which the rows are then joined to.
        """
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        shape = batch["input_ids"].shape
        if "position_ids" in inputs and is_flash_attention_requested(self.model.config):
            inputs = {name: tensor.flatten()[None] for name, tensor in inputs.items()}
        logits: Tensor = self.model(**inputs, use_cache=False).logits
        return logits.reshape(*shape, -1)

    def token_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss of predicting the successor of each token, and which successors are learnt.

        Returns:
            Two tensors (batch, length): the losses in float32, zero where nothing is learnt, and the mask.
        """
        logits = self(batch)
        successors = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)  # labels are smaller than logits to shift
        return token_cross_entropy(logits, successors)

    def training_step(self, batch: Batch) -> Tensor:
        """Return the mean loss of the learnt tokens of the batch, or zero if there are none."""
        losses, learnt = self.token_losses(batch)
        loss = losses.sum() / learnt.sum().clamp_min(1)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def evaluate(self, split: str, batch: Batch) -> None:
        """Log loss and perplexity of a batch of a split."""
        scored = self.token_losses(batch)
        self.log_scores(split, {"loss": scored, "perplexity": scored})

    def on_validation_epoch_end(self) -> None:
        """Show what the model makes of the prompts."""
        if self.prompts and not self.trainer.sanity_checking:
            show_answers(self.trainer, self.prompts, self._answer(self._asked()))

    def _asked(self) -> Batch:
        as_chat = getattr(self._data(), "asks", False)
        encoded = encode_asked(self.tokenizer, self.prompts, as_chat=as_chat)
        return {name: tensor.to(self.device) for name, tensor in encoded.items()}

    def _answer(self, batch: Batch) -> list[str]:
        """What the model writes; all processes do the same, because a sharded model needs all of them."""
        room, synced = self._room(batch["input_ids"].shape[1]), self.device_mesh is not None
        masks = batch["attention_mask"].bool()
        if room < self.max_new_tokens and len(masks) > 1 and not synced:
            # The longest row leaves less room than the others have, so that each is answered by itself.
            alone = [
                {name: tensor[row, mask][None] for name, tensor in batch.items()} for row, mask in enumerate(masks)
            ]
            return [text for one in alone for text in self._answer(one)]
        with self.trainer.precision_plugin.forward_context():
            return answer(self.model, self.tokenizer, batch, room, synced=synced)

    def _room(self, length: int) -> int:
        """How many tokens may be written after so many."""
        if self.max_positions is not None and length >= self.max_positions:
            raise ValueError(
                f"a prompt has {length} tokens and the model {self.max_positions} positions, which leaves no room for "
                "an answer: shorten it"
            )
        return min(self.max_new_tokens, (self.max_positions or length + self.max_new_tokens) - length)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor | list[dict[str, str]]:
        """Return the answer to each conversation, or the mean loss of each sequence's learnt tokens, in nats (batch,).

        A batch without labels holds conversations to answer.
        """
        if "labels" not in batch:
            return [{"generated": text} for text in self._answer(batch)]
        self._check_isolation()
        losses, learnt = self.token_losses(batch)
        return losses.sum(1) / learnt.sum(1).clamp_min(1)
