"""Tables and lines for the terminal, which nothing cuts short."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import get_console
from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_summary(table: Table, lines: Sequence[str], console: Console | None = None) -> None:
    """Print a table and the lines below it, which a narrow terminal or a file must not cut short.

    Args:
        table: Printed first.
        lines: Lines of plain text.
        console: Where to print; by default the console of the progress bar, so that the two do not disturb each other.
    """
    console = console or get_console()
    if not console.is_terminal:  # a file is as wide as it must be
        needed = console.measure(table, options=console.options.update_width(1000)).maximum
        console = Console(file=console.file, width=max(console.width, needed))
    console.print(table)
    print_lines(lines, console)


def print_lines(lines: Iterable[str], console: Console) -> None:
    """Print lines whole and as they are: a name in brackets is not markup."""
    for line in lines:
        console.print(Text(line), soft_wrap=True)
