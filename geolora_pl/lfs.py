"""Recognise the pointers that a clone without Git LFS holds in the place of large files."""

from __future__ import annotations

from pathlib import Path

_BEGINNING = b"version https://git-lfs"


def refuse_pointer(path: Path) -> None:
    """Refuse a pointer, which would be read as a broken file or as a text of three lines.

    Args:
        path: A file.

    Raises:
        ValueError: The file is a pointer.
    """
    with path.open("rb") as file:
        if file.read(len(_BEGINNING)) == _BEGINNING:
            raise ValueError(f"{path} is a Git LFS pointer and not the file itself: run git lfs pull")
