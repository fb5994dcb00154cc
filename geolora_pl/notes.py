"""Say once what is used, left out, cut, converted or guessed, and keep it for the folder of the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from lightning.pytorch.utilities import rank_zero_info

_kept: ContextVar[list[str] | None] = ContextVar("kept", default=None)


def note(text: str) -> None:
    """Tell the user something, once for everything that keeps its notes.

    Args:
        text: One line.

    Example:
        >>> notes = []
        >>> with keep_notes(notes):
        ...     note("2 images are left out")
        ...     note("2 images are left out")
        >>> notes
        ['2 images are left out']
    """
    kept = _kept.get()
    if kept is not None:
        if text in kept:
            return
        kept.append(text)
    rank_zero_info(text)


@contextmanager
def keep_notes(notes: list[str]) -> Iterator[None]:
    """Add to a list what is noted inside the block, and say nothing that the list already holds."""
    token = _kept.set(notes)
    try:
        yield
    finally:
        _kept.reset(token)
