"""Write files and folders completely or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path: str | Path, *, overwrite: bool = True, follow: bool = True) -> Iterator[Path]:
    """Yield a name in the same folder; the file or folder that is made under it becomes ``path`` at the end.

    The new file or folder is flushed to the disk before it is renamed. After an error it is deleted, and what was at
    ``path`` is still there. It is made in a hidden folder of its own, with a name that no other process has, so that
    several processes may write to one path: the last one that finishes counts. Links in ``path`` are followed, as by
    ``open``, unless ``follow`` says otherwise of the last one.

    Files may be read by whoever may read any other new file in that folder.

    A folder is replaced only by one that holds all its files again, so that nothing is deleted which was not made by
    the same work before.

    Args:
        path: The path of the finished file or folder; missing folders above it are made.
        overwrite: Whether to replace an existing file or folder.
        follow: Whether a link at ``path`` itself stays, and what it leads to is replaced; or else the link is replaced.

    Raises:
        ValueError: Something exists at ``path`` and may not be replaced, or a folder above it is a file.

    Example:
        >>> target = Path(tempfile.mkdtemp(), "note.txt")
        >>> with atomic(target) as unfinished:
        ...     _ = unfinished.write_text("whole")
        >>> target.read_text(), len(list(target.parent.iterdir()))
        ('whole', 1)
    """
    if not overwrite:
        refuse_existing(path)
    path = Path(path)
    path = path.resolve() if follow else path.parent.resolve() / path.name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{path} cannot be made: {error.filename} is a file and not a folder") from error
    # The name of the file may be as long as names can be.
    room = Path(tempfile.mkdtemp(prefix=f".{path.name[:32]}.", dir=path.parent))
    unfinished = room / "new" / path.name  # where no other name can be the same
    unfinished.parent.mkdir()
    try:
        yield unfinished
        _refuse_loss(path, unfinished)
        (room / "usual").touch()
        mode = (room / "usual").stat().st_mode
        for made in (unfinished, *unfinished.rglob("*")):
            if made.is_file() and not made.is_symlink():
                made.chmod(mode)  # safetensors lets nobody else read what it writes
            _flush(made)
        if path.is_dir():  # only a file replaces a file in one step
            path.rename(room / "before")
        unfinished.replace(path)
        _flush(path.parent)
    finally:
        if not path.exists() and (room / "before").exists():
            (room / "before").rename(path)
        shutil.rmtree(room)


def _refuse_loss(path: Path, unfinished: Path) -> None:
    """Refuse to replace what the new file or folder does not stand for.

    Raises:
        ValueError: A file is in the place of a folder or the other way round, or a file would be deleted.
    """
    if path.is_dir() and not unfinished.is_dir():
        raise ValueError(f"{path} is a folder, but a file must be written: name a file in it")
    if not unfinished.is_dir() or not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path} is a file, but a folder must be written: name another folder")
    if Path.cwd().is_relative_to(path):
        raise ValueError(f"{path} is the folder in which you work, and is not replaced: name a folder in it")
    made = {file.relative_to(unfinished) for file in unfinished.rglob("*")}
    if lost := sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.relative_to(path) not in made):
        raise ValueError(
            f"{path} holds {lost[0]}, which is no part of what is written ({len(lost)} such files): it would be "
            "deleted, so name another folder, or move it away"
        )


def refuse_existing(path: str | Path) -> None:
    """Raise an error if the path exists, before the work whose result could not be written.

    Raises:
        ValueError: Something exists at ``path``.
    """
    if Path(path).exists():
        raise ValueError(f"{path} exists already: choose another name, or allow to overwrite it")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
