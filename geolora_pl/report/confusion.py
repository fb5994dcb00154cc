"""How often each class was taken for which, as a table in the folder of a run: a task writes it, a report reads it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from geolora_pl.storage.atomic import atomic

NAME = "confusion.csv"
MOST_CLASSES = 100  # that anybody looks at in a table
_LARGEST = 1_000_000  # bytes


@dataclass(frozen=True)
class Confusion:
    """The confusion matrix of one validation.

    Attributes:
        step: The step of the validation, as loggers count.
        names: The names of the classes.
        counts: How many samples of each class (rows) were taken for which (columns).

    Example:
        >>> found = Confusion(9, ["cat", "dog"], [[3, 1], [0, 4]])
        >>> found.recall(0), found.precision(1)
        (0.75, 0.8)
    """

    step: int
    names: Sequence[str]
    counts: Sequence[Sequence[int]]

    def recall(self, index: int) -> float | None:
        """The part of a class that was found; ``None`` if there is no sample of it."""
        total = sum(self.counts[index])
        return self.counts[index][index] / total if total else None

    def precision(self, index: int) -> float | None:
        """The part of what was taken for a class that is of it; ``None`` if nothing was."""
        total = sum(row[index] for row in self.counts)
        return self.counts[index][index] / total if total else None


def write_confusion(folder: Path, found: Confusion) -> None:
    """Write a confusion matrix, over that of an earlier validation.

    Args:
        folder: That of the run.
        found: The matrix.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([f"class (rows) taken for (columns) at step {found.step}", *found.names])
    table.writerows([name, *row] for name, row in zip(found.names, found.counts, strict=True))
    with atomic(folder / NAME) as unfinished:
        unfinished.write_text(text.getvalue(), encoding="utf-8", errors="backslashreplace")


def read_confusion(folder: Path) -> Confusion | None:
    """The confusion matrix of a run; ``None`` if there is none, or its file is broken."""
    path = folder / NAME
    if not path.is_file() or path.stat().st_size > _LARGEST:
        return None
    try:
        head, *rows = csv.reader(io.StringIO(path.read_text(encoding="utf-8")))
        names = head[1:]
        counts = [[int(cell) for cell in row[1:]] for row in rows]
        step = int(head[0].rpartition(" ")[2])
    except (csv.Error, ValueError, IndexError):
        return None
    square = len(names) == len(counts) and all(len(row) == len(names) for row in counts)
    fits = square and 0 < len(names) <= MOST_CLASSES and all(0 <= count < 2**53 for row in counts for count in row)
    return Confusion(step, names, counts) if fits else None
