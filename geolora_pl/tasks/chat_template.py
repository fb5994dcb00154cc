"""Read the template with which a model reads conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def read_template(chat_template: str | None) -> str | None:
    """Return the template of a file.

    Args:
        chat_template: The name of the file, or the template itself, as a checkpoint holds it; ``None`` for none.

    Raises:
        ValueError: The file does not exist, or holds no template.
    """
    if chat_template is None or _is_template(chat_template):
        return chat_template
    path = Path(chat_template)
    if not path.is_file():
        raise ValueError(f"chat_template={chat_template!r} is not a file (from {Path.cwd()}): name a Jinja template")
    text = path.read_text(encoding="utf-8", errors="replace")
    if not _is_template(text):
        raise ValueError(f"chat_template={chat_template!r} is not a Jinja template: it has no {{% ... %}} in it")
    return text


def template_from_checkpoint(value: Any) -> str | None:
    """Accept a template, which runs in the sandbox of transformers, and no name of a file.

    Raises:
        ValueError: It is something else.
    """
    if value is not None and not (isinstance(value, str) and _is_template(value)):
        raise ValueError("is not a chat template")
    return value


def _is_template(text: str) -> bool:
    return "{%" in text and "%}" in text
