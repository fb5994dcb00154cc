"""Tables and lines for the terminal, which nothing cuts short."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich import get_console
from rich.console import Console
from rich.table import Table
from rich.text import Text

from geolora_pl.report.printable import printable
from geolora_pl.report.rank_map import RankMap


def layers_title(places: RankMap) -> str:
    """The head of a column of short names: what they leave out."""
    return f"layers of {places.beginning}" if places.beginning else "layers"


def depth_table(
    places: RankMap, ranks: Mapping[str, int], sizes: Mapping[str, int], before: Mapping[str, int] | None = None
) -> Table:
    """Ranks by kind of layer (rows) and depth, their mean, and the parameters.

    Args:
        places: The places of the adapters.
        ranks: The rank of each adapter.
        sizes: The number of its inputs and outputs, which is that of its parameters at rank 1.
        before: The ranks at the start, if they are known.
    """

    def mean(names: Iterable[str]) -> str:
        found = list(names)
        means = [sum(known[name] for name in found) / len(found) for known in (before, ranks) if known]
        return " -> ".join(f"{value:.1f}" for value in means)

    def parameters(names: Iterable[str]) -> str:
        return f"{sum(ranks[name] * sizes[name] for name in names):,}"

    table = Table(title="ranks found, by depth", title_justify="left", show_footer=True)
    table.add_column(Text(layers_title(places)), "all")
    table.add_column("ranks", "")
    table.add_column("mean rank", mean(ranks), justify="right", no_wrap=True)
    table.add_column("parameters", parameters(ranks), justify="right")
    for kind, label in places.short_kinds().items():
        names = places.of_kind(kind)
        table.add_row(
            Text(printable(label)), " ".join(str(ranks[name]) for name in names), mean(names), parameters(names)
        )
    return table


def print_summary(table: Table, lines: Sequence[str], console: Console | None = None) -> None:
    """Print a table and the lines below it, which a narrow terminal or a file must not cut short.

    Args:
        table: Printed first.
        lines: Lines of plain text.
        console: Where to print; by default the console of the progress bar, so that the two do not disturb each other.
    """
    for column in table.columns:
        column.overflow = "fold"  # a number that ends in dots is another one
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
