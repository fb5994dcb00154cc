"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path: str | Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a name in the same folder; the file or folder that is made under it becomes ``path`` at the end.

    It is flushed to the disk before it is renamed. After an error nothing of it is left, and what was at ``path`` is
    still there.

    Args:
        path: Where the file or folder shall be; folders above it are made.
        overwrite: Whether something that is there already is replaced.

    Raises:
        ValueError: There is something at ``path`` that may not be replaced, or a folder above it is a file.

    Example:
        >>> target = Path(tempfile.mkdtemp(), "note.txt")
        >>> with atomic(target) as unfinished:
        ...     _ = unfinished.write_text("whole")
        >>> target.read_text(), len(list(target.parent.iterdir()))
        ('whole', 1)
    """
    path = Path(path)
    if not overwrite:
        refuse_existing(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{path} cannot be made: {error.filename} is a file and no folder") from error
    room = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    unfinished = room / path.name
    try:
        yield unfinished
        if path.is_dir() and not unfinished.is_dir():
            raise ValueError(f"{path} is a folder, and a file is to be written: name a file in it")
        for made in (unfinished, *unfinished.rglob("*")):
            _flush(made)
        if path.is_dir() or (path.exists() and unfinished.is_dir()):  # only a file replaces a file in one step
            path.rename(room / "before")
        unfinished.replace(path)
        _flush(path.parent)
    finally:
        if not path.exists() and (room / "before").exists():
            (room / "before").rename(path)
        shutil.rmtree(room)


def refuse_existing(path: str | Path) -> None:
    """Stop before the work where its result could not be written.

    Raises:
        ValueError: There is something at ``path``.
    """
    if Path(path).exists():
        raise ValueError(f"{path} exists already: choose another name, or allow to overwrite it")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
