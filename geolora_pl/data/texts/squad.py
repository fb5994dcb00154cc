"""Read the nested JSON in which SQuAD comes: articles, paragraphs, questions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from geolora_pl.data.texts.tables import read_text


def read_squad(path: str | Path) -> pa.Table | None:
    """Read a file in the layout of SQuAD.

    Args:
        path: The file.

    Returns:
        The columns ``id``, ``question``, ``context`` and ``answers``, a list of ``text`` and ``answer_start``, or
        ``None`` if the file is not one object with the key ``data``.

    Raises:
        ValueError: The file is missing, empty, not in UTF-8 or holds no questions, or a part of the layout is missing.
    """
    try:
        content = json.loads(read_text(Path(path)))
    except (json.JSONDecodeError, RecursionError):
        return None
    if not isinstance(content, dict) or "data" not in content:
        return None
    try:
        rows = list(_questions(content["data"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not in the layout of SQuAD, data/paragraphs/qas: {error} is missing or of another kind"
        ) from error
    if not rows:
        raise ValueError(f"{path} holds no questions")
    try:
        return pa.Table.from_pylist(rows)
    except pa.ArrowException as error:
        raise ValueError(f"{path} mixes kinds of values in its questions: {error}") from error


def _questions(articles: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for article in articles:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                yield {
                    "id": str(question["id"]),
                    "question": question["question"],
                    "context": paragraph["context"],
                    "answers": question.get("answers", []),
                }
