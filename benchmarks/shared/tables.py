"""Results as a table in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table


def table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> Table:
    """A table to be printed.

    Args:
        header: Names of the columns.
        rows: The cells, row by row.
        title: Stands above the table.
    """
    made = Table(*header, title=title)
    for row in rows:
        made.add_row(*row)
    return made
