"""Define the task of sequence to sequence: a text is written for a text, such as its summary or translation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torchmetrics.functional.text import rouge_score
from transformers import AutoModelForSeq2SeqLM, GenerationConfig, GenerationMixin

from geolora_pl.errors import in_one_line
from geolora_pl.tasks.metrics import Mean
from geolora_pl.tasks.transformer import Batch, TransformerTask, token_cross_entropy

_ROUGE = ("rouge1", "rouge2", "rougeL")
_MODES = ("num_beams", "do_sample")  # the settings that say in which way a model writes; others are for one of them
_LENGTHS = ("max_length", "max_new_tokens")  # of which the task's own argument is the one that counts


class Seq2SeqLM(TransformerTask):
    r"""Adapt a pretrained model with encoder and decoder, such as T5 or BART, to write a text for a text.

    The loss is the mean over the tokens of the targets of :math:`-\log p(y_t \mid x, y_{<t})`, in nats. In an
    evaluation the model also writes its own texts, and their ROUGE is logged: the F1 of words, of pairs of words and of
    the longest common subsequence, where words are of letters and digits in any script. Only the adapters are trained,
    by default those of the linear layers of the blocks.

    Args:
        model_name: A name of the hub, a folder, or ``pkg://package/folder``; see :class:`TransformerTask`.
        max_new_tokens: Number of tokens of the longest text that is written, at least 1.
        generation: Further settings of ``transformers.GenerationConfig``, such as ``num_beams`` and ``length_penalty``;
            they replace those that come with the model.
        **kwargs: Arguments of :class:`TransformerTask`.

    Raises:
        ValueError: An argument is out of range, or the model is not there or cannot be adapted.

    Example:
        >>> import torch
        >>> tiny = {"model_type": "t5", "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
        >>> tiny |= {"vocab_size": 11, "decoder_start_token_id": 0}
        >>> task = Seq2SeqLM("tiny", pretrained=False, model_args=tiny)
        >>> task.configure_model()
        >>> tokens, labels = torch.ones(2, 5, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)
        >>> task({"input_ids": tokens, "labels": labels}).shape
        torch.Size([2, 3, 11])
    """

    auto_class = AutoModelForSeq2SeqLM
    sources = "Seq2SeqFiles or Seq2SeqHub"

    def __init__(
        self, model_name: str, max_new_tokens: int = 128, generation: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(model_name, **kwargs)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
        self.max_new_tokens = max_new_tokens
        self.generation = generation or {}
        for name in _LENGTHS:
            if name in self.generation:
                raise ValueError(
                    f"generation.{name}={self.generation[name]!r} would not count beside max_new_tokens="
                    f"{max_new_tokens}: set that, and leave it out of generation"
                )

    @classmethod
    def argument_from_checkpoint(cls, name: str, value: Any) -> Any:
        """Accept numbers for the settings of generation, but for lengths.

        Raises:
            ValueError: The checkpoint says more.
        """
        if name == "generation" and value is not None:
            kept = _numbers(value)
            if not isinstance(value, Mapping) or value.keys() - {*kept, *_LENGTHS}:
                raise ValueError("is not a mapping of names to numbers")
            value = kept
        return super().argument_from_checkpoint(name, value)

    def configure_model(self) -> None:
        """Build the model and put the adapters in; a sharded one is gathered to write, too."""
        is_new = not hasattr(self, "model")  # Lightning calls this more than once
        super().configure_model()
        if is_new and self.device_mesh is not None:  # generate calls the encoder without the model around it
            register_fsdp_forward_method(self.model, "generate")

    def build_model(self) -> nn.Module:
        """Load the model and set how it writes.

        Raises:
            ValueError: The model cannot be loaded, or ``generation`` has unknown or impossible settings.
        """
        model = super().build_model()
        assert isinstance(model, GenerationMixin)
        config = model.generation_config
        if self.max_positions is not None and self.max_new_tokens > self.max_positions:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} is more than the {self.max_positions} positions of the model"
            )
        try:
            lengths = dict(zip(_LENGTHS, (None, self.max_new_tokens), strict=True))
            came = config.to_diff_dict()
            unknown = config.update(**self.generation, **lengths)
            _forget_unsuited(config, came.keys() - self.generation.keys())
            config.validate(strict=True)
        except ValueError as error:
            raise ValueError(f"generation={self.generation!r} does not work: {in_one_line(error)}") from error
        if unknown:
            raise ValueError(f"generation={unknown!r}: GenerationConfig of transformers has no such settings")
        if config.num_return_sequences not in (None, 1):
            raise ValueError(f"generation={self.generation!r}: num_return_sequences must be 1, a text for each text")
        # A checkpoint then writes as this model does, also what came with the pretrained one.
        self.hparams["generation"] = _numbers(config.to_diff_dict())
        return model

    def setup(self, stage: str) -> None:
        """Make the metrics, one collection per set of texts."""
        super().setup(stage)
        self.make_split_metrics(lambda: {name: Mean() for name in _ROUGE})

    def forward(self, batch: Batch) -> Tensor:
        """Return logits (batch, target length, vocabulary) of the tokens of targets, by those before them."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "target"}
        logits: Tensor = self.model(**inputs, use_cache=False).logits
        return logits

    def token_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss of each token of the targets, and which tokens are no padding.

        Returns:
            Two tensors (batch, target length): the losses in float32, zero for padding, and the mask.
        """
        return token_cross_entropy(self(batch), batch["labels"])

    def training_step(self, batch: Batch) -> Tensor:
        """Return the mean loss of the tokens of the targets."""
        losses, learnt = self.token_losses(batch)
        loss = losses.sum() / learnt.sum().clamp_min(1)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def evaluate(self, split: str, batch: Mapping[str, Any]) -> None:
        """Log loss and ROUGE of a batch of a split."""
        losses, learnt = self.token_losses(batch)
        written = self.write(batch)
        found = rouge_score(written, batch["target"], normalizer=_plain, rouge_keys=_ROUGE)
        scores = {name: (float(found[f"{name}_fmeasure"]), len(written)) for name in _ROUGE}
        self.log_scores(split, {"loss": (losses, learnt), **scores})

    def write(self, batch: Batch) -> list[str]:
        """Return the text that the model writes for each text of a batch."""
        model: Any = self.model
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        # A sharded model needs all processes until the last one has finished.
        tokens = model.generate(**inputs, synced_gpus=self.device_mesh is not None)
        texts: list[str] = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, str]]:
        """Return the text that is written for each text."""
        return [{"generated": text} for text in self.write(batch)]


def _forget_unsuited(config: GenerationConfig, came: Iterable[str]) -> None:
    """Set back what came with a model and is for another way of writing, such as with beams, than it has now."""
    modes, usual = {mode: getattr(config, mode) for mode in _MODES}, GenerationConfig()
    for name in sorted(set(came).difference(_MODES)):
        try:
            GenerationConfig(**modes, **{name: getattr(config, name, None)}).validate(strict=True)
        except ValueError:
            setattr(config, name, getattr(usual, name, None))


def _numbers(settings: object) -> dict[str, Any]:
    """The settings that are numbers or lists of numbers, but for lengths; the others name code, places or versions."""
    if not isinstance(settings, Mapping):
        return {}
    known = {name: value for name, value in settings.items() if name[:1] != "_" and name not in _LENGTHS}
    return {name: value for name, value in known.items() if _is_number(value) or _never_stops(name, value)}


def _never_stops(name: str, value: object) -> bool:
    """Whether it is the one word that is a setting of a search."""
    return name == "early_stopping" and value == "never"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) or (isinstance(value, list | tuple) and all(map(_is_number, value)))


def _plain(text: str) -> str:
    """A text as words of letters and digits in lower case; of ASCII it is what ROUGE always makes."""
    return re.sub(r"[\W_]+", " ", text.lower())
