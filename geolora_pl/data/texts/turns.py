"""Find what the assistant says in a conversation that a chat template has written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from geolora_pl.data.texts.padding import IGNORED
from geolora_pl.data.texts.sequences import Columns

_END = 3  # tokens at the end of a turn, among which a special one is looked for; a line feed may follow it
_MARKS_TURNS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_chats(batch: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, limit: int) -> Columns:
    """Return token ids of conversations, and labels that leave out all but the assistant's turns.

    A template that has ``{% generation %}`` says itself what the assistant says. With any other, a turn is what the
    template adds to the conversation before it, with the prompt for an answer, up to the token that ends the turn.

    Args:
        batch: A batch with the columns ``chat``, JSON objects with ``messages``, and ``where``.
        tokenizer: The tokenizer of the model, with a chat template.
        limit: Number of tokens that a conversation is cut to, at its end.

    Returns:
        The columns ``input_ids``, ``labels``, ``length``, ``cut``, whether a conversation was cut, ``rewritten``,
        whether the template writes an earlier turn in another way once it has been answered, so that it is not learnt,
        and ``endless``, whether the last turn ends without a special token.

    Raises:
        ValueError: The template refuses a conversation, or its last turn cannot be found.
    """
    columns: dict[str, list[Any]] = {
        name: [] for name in ("input_ids", "labels", "length", "cut", "rewritten", "endless")
    }
    special = set(tokenizer.added_tokens_decoder)
    for text, where in zip(batch["chat"], batch["where"], strict=True):
        ids, learnt, rewritten = _encode(json.loads(text), where, tokenizer)
        labels = np.where(learnt, ids, IGNORED)[:limit].tolist()
        endless = special.isdisjoint(np.array(ids)[learnt][-_END:].tolist())
        values = (ids[:limit], labels, len(labels), len(ids) > limit, rewritten, endless)
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)  # in the order of their names
    return columns


def encode_prompts(batch: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, limit: int) -> Columns:
    """Return token ids of conversations with the beginning of the assistant's next turn.

    Args:
        batch: A batch with the columns ``chat``, JSON objects with ``messages``, and ``where``.
        tokenizer: The tokenizer of the model, with a chat template.
        limit: The greatest number of tokens.

    Returns:
        The columns ``input_ids`` and ``length``.

    Raises:
        ValueError: The template refuses a conversation, or one is too long.
    """
    columns: dict[str, list[Any]] = {"input_ids": [], "length": []}
    for text, where in zip(batch["chat"], batch["where"], strict=True):
        chat = json.loads(text)
        rendered = _renderer(chat, where, tokenizer)(chat["messages"], add_generation_prompt=True)
        ids = tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) > limit:
            raise ValueError(f"{where} has {len(ids)} tokens, which is more than max_length={limit}: shorten it")
        columns["input_ids"].append(ids)
        columns["length"].append(len(ids))
    return columns


def _renderer(chat: Mapping[str, Any], where: str, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Any]:
    """The function that applies the template to messages, and says where it refuses them."""
    apply = partial(tokenizer.apply_chat_template, tools=chat.get("tools"))

    def render(messages: list[dict[str, Any]], tokenize: bool = False, **settings: Any) -> Any:
        try:
            return apply(messages, tokenize=tokenize, **settings)
        except (TemplateError, TypeError, ValueError) as error:  # a template may raise, and be wrong
            raise ValueError(f"{where} is refused by the chat template: {error}") from error

    return render


def _encode(
    chat: Mapping[str, Any], where: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], np.ndarray[Any, np.dtype[np.bool_]], bool]:
    """The token ids of a conversation, which of them are learnt, and whether a turn of the assistant is not."""
    messages, render = chat["messages"], _renderer(chat, where, tokenizer)
    turns = sum(message["role"] == "assistant" for message in messages)
    if _MARKS_TURNS.search(tokenizer.get_chat_template(tools=chat.get("tools"))):
        marked = render(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        learnt = np.array(marked["assistant_masks"], bool)
        if not learnt.any():
            raise ValueError(f"{where} has an answer, but {{% generation %}} of the chat template marks none")
        return marked["input_ids"], learnt, False
    whole = render(messages)
    spans = _spans(messages, whole, render, tokenizer.eos_token)
    if not spans or spans[-1][1] < len(whole.rstrip()):
        raise ValueError(
            f"{where}: the chat template writes the last turn of the assistant in another way than it asks for it "
            "(add_generation_prompt), so that the turn cannot be found: give a chat_template that puts "
            "{% generation %} and {% endgeneration %} around what the assistant says"
        )
    encoded = tokenizer(
        whole, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    begins = np.array(encoded["offset_mapping"])[:, 0]
    learnt = np.zeros(len(begins), bool)
    for start, end in spans:
        learnt |= (begins >= start) & (begins < end)
    return encoded["input_ids"], learnt, len(spans) < turns


def _spans(
    messages: list[dict[str, Any]], whole: str, render: Callable[..., str], end: str | None
) -> list[tuple[int, int]]:
    """Where in the whole text the turns of the assistant are, without those that it does not write as they began."""
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(messages[:number], add_generation_prompt=True)
        # A line feed after the token that ends a turn belongs to the next one; some templates end as a text does, too.
        after = render(messages[: number + 1]).rstrip()
        ends = (after, after.removesuffix(end).rstrip()) if end else (after,)
        found = [len(until) for until in ends if whole.startswith(until) and len(until) > len(before)]
        if found and whole.startswith(before):
            spans.append((len(before), found[0]))
    return spans
