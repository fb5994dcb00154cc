"""Read conversations: rows of files as messages, in each of the usual forms."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from geolora_pl.data.texts.tables import read_parquet, read_text
from geolora_pl.notes import note

Row = Mapping[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
_OF_SHAREGPT = {"human": "user", "gpt": "assistant"}  # further names are those of ROLES


def read_conversations(path: str | Path) -> list[tuple[str, Row]]:
    """Read the rows of a file of conversations.

    Args:
        path: A ``.jsonl`` file with one object per line, a ``.json`` file with such lines or a list of objects, or a
            ``.parquet`` file.

    Returns:
        For each row, where it is, for messages, and its content.

    Raises:
        ValueError: The file is missing, empty, broken or of another kind.
    """
    path = Path(path)
    if path.suffix.lower() == ".parquet":
        found: list[tuple[str, Any]] = list(of_columns(read_parquet(path).to_pylist(), path))
    elif path.suffix.lower() in (".jsonl", ".json"):
        found = list(_json_rows(path))
    else:
        raise ValueError(f"{path} must end in .jsonl, .json or .parquet: conversations are lists, which a table is not")
    if wrong := [where for where, row in found if not isinstance(row, dict)]:
        raise ValueError(f"{wrong[0]} is not an object: each row must be one, {_FORM}")
    if not found:
        raise ValueError(f"{path} holds no rows")
    return found


def of_columns(rows: Iterable[Row], source: object) -> Iterator[tuple[str, Row]]:
    """Rows of a table, each with its place, without what is empty in them.

    A table has the same keys in every row: a call of one tool would have the arguments of all the others, as nulls.

    Args:
        rows: The rows.
        source: Where they are, for messages.

    Example:
        >>> dict(of_columns([{"arguments": {"city": "Paris", "x": None}}], "chats.parquet"))
        {'chats.parquet: row 1': {'arguments': {'city': 'Paris'}}}
    """
    for number, row in enumerate(rows, 1):
        yield f"{source}: row {number}", _without_nulls(row)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return value


_FORM = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    text = read_text(path)
    try:
        if text.lstrip().startswith("["):
            entries = json.loads(text, object_pairs_hook=_object)
            yield from ((f"{path}: entry {number}", entry) for number, entry in enumerate(entries, 1))
            return
        for number, line in enumerate(text.split("\n"), 1):
            where = f"{path}: line {number}"
            if line.strip():
                yield where, json.loads(line, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        place = path if text.lstrip().startswith("[") else where
        raise ValueError(f"{place} cannot be read: {error}; a line must hold one object, {_FORM}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, in which no key may be there twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object has the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return made


def to_dataset(rows: Iterable[tuple[str, Row]], source: object, *, answered: bool) -> datasets.Dataset:
    """Make a data set of the conversations, from which those that teach nothing are left out.

    Args:
        rows: For each row, where it is, and its content.
        source: Where they are, for messages.
        answered: Whether the assistant must answer in them; otherwise the last turns of the assistant are removed, and
            every conversation must end with what the assistant shall answer.

    Returns:
        The columns ``chat``, a JSON object with ``messages``, and ``where``.

    Raises:
        ValueError: A row is not a conversation, or none is left.
    """
    chats: list[str] = []
    places: list[str] = []
    left_out: dict[str, list[str]] = {}
    for where, row in rows:
        chat = _chat_of(row, where)
        chat["messages"] = _without_end(chat["messages"], "assistant" if not answered else None)
        if fault := _fault(chat["messages"], answered):
            if not answered:
                raise ValueError(f"{where} {fault[0]}: give it something to answer, or remove it")
            left_out.setdefault(fault[1], []).append(where)
            continue
        chats.append(json.dumps(chat, ensure_ascii=False))
        places.append(where)
    for reason, wheres in left_out.items():
        note(f"{source}: conversations left out because they {reason}: {len(wheres)}, the first is {wheres[0]}")
    if not chats:
        raise ValueError(f"{source} has no conversation to learn from: each needs a user's and an assistant's turn")
    return datasets.Dataset(pa.table({"chat": chats, "where": places}))


def _chat_of(row: Row, where: str) -> dict[str, Any]:
    """The messages of a row as the chat templates know them, with the tools that they may call."""
    turns = next((row[name] for name in ("messages", "conversations") if row.get(name) is not None), None)
    prompt, completion = row.get("prompt"), row.get("completion")
    if turns is None and isinstance(prompt, str) and isinstance(completion, str | None):
        turns = [{"role": "user", "content": prompt}]
        turns += [] if completion is None else [{"role": "assistant", "content": completion}]
    if not isinstance(turns, list):
        keys = ", ".join(map(repr, list(row)[:8]))
        raise ValueError(
            f"{where} is not a conversation: it has {keys}; write {_FORM}, or prompt and completion as texts"
        )
    messages = [_message_of(turn, f"{where}, message {number}") for number, turn in enumerate(turns, 1)]
    return {"messages": messages} | ({"tools": row["tools"]} if row.get("tools") else {})


def _message_of(turn: object, where: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise ValueError(f"{where} is not an object: write {_FORM}")
    turn = {name: value for name, value in turn.items() if value is not None}
    if "from" in turn and "role" not in turn:  # ShareGPT's names
        role = _OF_SHAREGPT.get(turn["from"], turn["from"])
        turn = {"role": role, "content": turn.get("value", "")}
    if turn.get("role") not in ROLES:
        raise ValueError(
            f"{where} has role={turn.get('role')!r}, which must be one of {', '.join(ROLES)}: rename it in the file"
        )
    if not isinstance(turn.setdefault("content", ""), str):
        raise ValueError(f"{where} has a content that is not a text: a language model takes texts alone")
    return turn


def _without_end(messages: list[dict[str, Any]], role: str | None) -> list[dict[str, Any]]:
    """Remove the last messages of a role, or if it is ``None``, all that follow the assistant's last one."""
    kept = list(messages)
    while kept and (kept[-1]["role"] == role if role else kept[-1]["role"] != "assistant"):
        kept.pop()
    return kept


def _fault(messages: Sequence[Mapping[str, Any]], answered: bool) -> tuple[str, str] | None:
    """What one conversation, and several, do that nothing can be learnt from them."""
    roles = [message["role"] for message in messages]
    if answered and "assistant" not in roles:
        return "has no turn of the assistant", "have no turn of the assistant"
    if "user" not in roles:
        return "has no turn of a user", "have no turn of a user"
    if "assistant" in roles and roles.index("assistant") < roles.index("user"):
        return "starts with the assistant", "start with the assistant"
    spoken = [message for message in messages if message["role"] in ("user", "assistant")]
    if any(not message["content"].strip() and not message.get("tool_calls") for message in spoken):
        return "has an empty turn", "have an empty turn"
    return None
