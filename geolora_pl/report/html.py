"""Elements of the page of a report: figures, tables, numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from matplotlib.figure import Figure

from geolora_pl.report import figures
from geolora_pl.report.runs import Curve

_HINT = "<figcaption>scroll to see all →</figcaption>"


def curves(series: Mapping[str, Curve], title: str, salt: str) -> str:
    """A figure of curves, with where each begins and ends in words."""
    alt = f"{title} over steps: " + "; ".join(f"{label} {_course(curve)}" for label, curve in series.items() if curve)
    return figure(figures.curves(series, title), alt, salt)


def figure(drawn: Figure, alt: str, salt: str, wide: bool = False) -> str:
    """A figure.

    Args:
        drawn: It.
        alt: What it shows, in words.
        salt: Unique on the page.
        wide: Whether it may be wider than a small screen, which then shows a part of it and says so.
    """
    image = figures.svg(drawn, escape(alt), salt)
    if not wide:
        return f"<figure>{image}</figure>"
    return f'<figure><div class="scroll" tabindex="0">{image}</div>{_HINT}</figure>'


def row(drawn: Iterable[str]) -> str:
    """Figures side by side."""
    return f'<div class="figures">{"".join(drawn)}</div>'


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], caption: str, marks: Mapping[tuple[int, int], str] | None = None
) -> str:
    """A table whose rows begin with their names.

    Args:
        head: The names of the columns.
        rows: The cells, as text.
        caption: What it is.
        marks: Classes for the style of cells, by row and column.
    """
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(cells[0])}</th>'
        + "".join(_cell(cell, (marks or {}).get((i, j))) for j, cell in enumerate(cells[1:]))
        + "</tr>"
        for i, cells in enumerate(rows)
    )
    kind = ' class="cells"' if marks else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table{kind}><caption>'
        f"{escape(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(cell: str, mark: str | None) -> str:
    return f'<td class="{mark}">{escape(cell)}</td>' if mark else f"<td>{escape(cell)}</td>"


def fold(summary: str, content: str) -> str:
    """Content that is shown when it is asked for."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def number(value: float | None) -> str:
    """A number with four digits; a large whole one with all of them; nothing for ``None``.

    Example:
        >>> number(0.123456), number(18048.0), number(None)
        ('0.1235', '18,048', '')
    """
    if value is None:
        return ""
    return f"{value:,.0f}" if value == round(value) and abs(value) >= 100 else f"{value:.4g}"


def _course(curve: Curve) -> str:
    (first, start), (last, end) = curve[0], curve[-1]
    return f"from {number(start)} at step {first} to {number(end)} at step {last}"
