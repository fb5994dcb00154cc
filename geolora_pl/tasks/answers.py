"""Let a language model write, and show what it writes while it trains."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import indent
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from geolora_pl.storage.atomic import atomic
from geolora_pl.tasks.modes import evaluation

NAME = "generated.jsonl"  # in the folder of a run


@torch.no_grad()
def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    batch: Mapping[str, Tensor],
    max_new_tokens: int,
    synced: bool = False,
) -> list[str]:
    """Let a model go on with token ids, with the likeliest token each time, so that no random number is drawn.

    Args:
        model: Of transformers; it is in evaluation mode meanwhile.
        tokenizer: Its tokenizer.
        batch: ``input_ids`` and ``attention_mask`` (batch, length), padded on the left.
        max_new_tokens: The largest number of tokens per text.
        synced: Whether the model is sharded, so that all processes must go on until the last one has finished.

    Returns:
        The new texts, without special tokens.
    """
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    own, model.generation_config = model.generation_config, settings  # whose sampling settings would be warned of
    try:
        with evaluation(model):
            written = model.generate(**batch, synced_gpus=synced)
    finally:
        model.generation_config = own
    new = written[:, batch["input_ids"].shape[1] :]
    texts: list[str] = tokenizer.batch_decode(new, skip_special_tokens=True)
    return texts


def stop_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: those of the model and the tokenizer, and the one that ends an assistant's turn.

    Many base models have a chat template whose turns end with another token than their texts.
    """
    known = model.generation_config.eos_token_id
    tokens = {*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id, turn_end(tokenizer)}
    return sorted(token for token in tokens if token is not None)


def end_at(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a model end its texts with any of its :func:`stop_tokens`, wherever it is loaded."""
    model.generation_config.eos_token_id = stop_tokens(model, tokenizer)


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token with which the chat template ends a turn of the assistant, if there is one."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    written = str(tokenizer.apply_chat_template(turns, tokenize=False))
    _, said, behind = written.rpartition("answer")
    tokens = tokenizer(behind.strip(), add_special_tokens=False)["input_ids"] if said else []
    return tokens[0] if tokens and tokens[0] in tokenizer.added_tokens_decoder else None


def encode_asked(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, as_chat: bool) -> dict[str, Any]:
    """Token ids of prompts, padded on the left.

    Args:
        tokenizer: Of the model.
        prompts: At least one.
        as_chat: Whether they are what a user says, which the chat template writes; otherwise they are as they are.
    """
    if as_chat:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        written = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        tokens = tokenizer(written, add_special_tokens=False)["input_ids"]
    else:
        tokens = tokenizer(list(prompts))["input_ids"]
    # A few tokenizers end every text, but this one goes on.
    rows = [{"input_ids": ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids} for ids in tokens]
    return dict(tokenizer.pad(rows, padding_side="left", return_tensors="pt"))


def start_answers(trainer: L.Trainer) -> None:
    """Remove from the folder of the run what another run has written there after the step where this one starts."""
    folder = trainer.log_dir  # of which all processes must ask
    if trainer.is_global_zero:
        path = _path(trainer, folder)
        rows = [row for row in _rows(path) if row["step"] <= trainer.global_step and trainer.global_step]
        if path.exists():
            _write(path, rows)


def show_answers(trainer: L.Trainer, prompts: Sequence[str], texts: Sequence[str]) -> None:
    """Give what a model has written to the loggers, and to the folder of the run.

    Args:
        trainer: Its step is written as well.
        prompts: The prompts.
        texts: What it has written, one per prompt.
    """
    folder = trainer.log_dir  # of which all processes must ask
    if not trainer.is_global_zero:
        return
    step = trainer.global_step
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
                said = f"{indent(prompt, '> ')}\n\n{indent(text, '    ')}"
                logger.experiment.add_text(f"generated/{number}", said, step)
        elif isinstance(logger, WandbLogger):
            rows = [list(row) for row in zip(prompts, texts, strict=True)]
            logger.log_text("generated", columns=["prompt", "generated"], data=rows, step=step)
    path = _path(trainer, folder)
    new = [{"step": step, "prompt": p, "generated": t} for p, t in zip(prompts, texts, strict=True)]
    _write(path, [*(row for row in _rows(path) if row["step"] != step), *new])


def _path(trainer: L.Trainer, folder: str | None) -> Path:
    return Path(folder or trainer.default_root_dir, NAME)


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with atomic(path) as unfinished:
        unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
