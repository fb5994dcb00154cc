"""The pictures of a report: curves, rank maps and ranks over time, as matplotlib's figures and as SVG for a page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from geolora_pl.report.rank_map import RankMap, depth_label
from geolora_pl.report.runs import Curve

# Colours for a light page; a page replaces each by the variable of that name, so that it can be dark as well.
COLOURS = {
    "ink": "#1f2328",
    "faint": "#59626c",
    "line": "#d5dae0",
    "paper": "#fdfdfe",
    "s0": "#2368b5",
    "s1": "#bf5318",
    "s2": "#24815c",
    "s3": "#8748ae",
    "s4": "#96700d",
    "s5": "#b93a72",
    "s6": "#14808c",
    "s7": "#5b6470",
    "on-low": "#15202b",
    "on-high": "#fffffe",
    "r0": "#cfe0f2",
    "r1": "#b9d2ec",
    "r2": "#9fc1e4",
    "r3": "#84aedb",
    "r4": "#699bd0",
    "r5": "#588ec9",
    "r6": "#3a70b0",
    "r7": "#285997",
    "r8": "#184277",
}
_SERIES = [colour for name, colour in COLOURS.items() if name.startswith("s")]
_RAMP = [colour for name, colour in COLOURS.items() if re.fullmatch(r"r\d", name)]
_DIRECT, _SHORT = 8, 20  # lines, and characters of their names, that are labelled at their ends
_NARROW, _WIDE = 4.4, 8.8  # inches
_POINTS = 400
_BARS = 20_000  # of ranks by adapter: more is a page that takes long to make and to show
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.parse_math": False,  # a name with dollars is no formula
    "svg.fonttype": "none",  # text stays text
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["faint"],
    "axes.edgecolor": COLOURS["line"],
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.6,
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["faint"],
    "ytick.labelcolor": COLOURS["faint"],
    "legend.frameon": False,
    "legend.labelcolor": COLOURS["ink"],
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def curves(series: Mapping[str, Curve], title: str, size: tuple[float, float] = (4.4, 2.9)) -> Figure:
    """Values over steps, one line for each series.

    Args:
        series: The series by their labels; one without points has its colour all the same, so that figures beside
            each other agree.
        title: The title of the figure.
        size: The size in inches.
    """
    with matplotlib.rc_context(_STYLE):
        figure, ax = _axes(title, size)
        lines: dict[str, Line2D] = {}
        for i, (label, curve) in enumerate(series.items()):
            if not curve:
                continue
            steps, values = zip(*thin(curve), strict=True)
            marker = "o" if len(steps) == 1 else ""
            if max(values) >= 1000:
                ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            (line,) = ax.plot(steps, values, marker=marker, color=_SERIES[i % 8], linestyle=_dashes(i))
            lines[label] = _seen(line, lines)
        _finish(figure, ax, lines, named=len(series) > 1)
    return figure


def ranks_over_steps(ranks: Mapping[str, Curve], title: str, size: tuple[float, float] = (4.4, 2.9)) -> Figure:
    """The mean rank of every kind of layer over steps.

    Args:
        ranks: The ranks by adapter.
        title: The title of the figure.
        size: The size in inches.
    """
    places = RankMap.of(ranks)
    with matplotlib.rc_context(_STYLE):
        figure, ax = _axes(title, size)
        lines: dict[str, Line2D] = {}
        for i, (kind, label) in enumerate(places.short_kinds().items()):
            steps, mean = zip(*_mean([ranks[name] for name in places.of_kind(kind)]), strict=True)
            (line,) = ax.step(steps, mean, where="post", color=_SERIES[i % 8], linestyle=_dashes(i))
            lines[label] = _seen(line, lines)
        ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        _finish(figure, ax, lines)
    return figure


def rank_map(ranks: Mapping[str, int], title: str) -> Figure:
    """The ranks by kind of layer (rows) and depth (columns).

    Args:
        ranks: The ranks by adapter.
        title: The title of the figure.
    """
    places = RankMap.of(ranks)
    labels = places.short_kinds()
    rows, columns = len(places.kinds), len(places.depths)
    needed = 0.35 + 0.075 * max(map(len, labels.values())) + (0.42 if columns <= 12 else 0.32) * columns
    width = max(needed, _NARROW if columns <= 12 else _WIDE)
    with matplotlib.rc_context(_STYLE):
        figure, ax = _axes(title, (width, max(2.9 if width == _NARROW else 0, 0.75 + 0.36 * rows)))
        low, high = min(ranks.values()), max(ranks.values())
        row_of, column_of = ({place: at for at, place in enumerate(of)} for of in (places.kinds, places.depths))
        for name, (kind, depth) in places.places.items():
            i, j, level = row_of[kind], column_of[depth], _level(ranks[name], low, high)
            ax.add_patch(_cell(j, i, level))
            ink = COLOURS["on-high" if level >= 6 else "on-low"]
            ax.text(j, i, str(ranks[name]), color=ink, ha="center", va="center")
        ax.set_xlim(-0.5, columns - 0.5)
        ax.set_ylim(rows - 0.5, -0.5)
        ax.set_xticks(range(columns), [depth_label(depth) for depth in places.depths])
        ax.set_yticks(range(rows), list(labels.values()))
        if any(places.depths):
            ax.set_xlabel("depth")
        _bare(ax)
    return figure


def ranks_by_adapter(ranks: Mapping[str, Curve], title: str) -> Figure:
    """The rank of every adapter (rows) over steps.

    Args:
        ranks: The ranks by adapter.
        title: The title of the figure.
    """
    places = RankMap.of(ranks)
    labels = places.short_names()
    values = [value for curve in ranks.values() for _, value in curve]
    low, high, last = min(values), max(values), max(curve[-1][0] for curve in ranks.values())
    height = 0.19 if len(ranks) <= 24 else 0.15 if len(ranks) <= 64 else 6.5 / len(ranks)
    with matplotlib.rc_context(_STYLE):
        figure, ax = _axes(title, (_WIDE, 0.95 + height * len(ranks)))
        bars: list[list[Any]] = [[] for _ in _RAMP]
        every = -(-sum(map(len, ranks.values())) // _BARS)
        for i, name in enumerate(places.places):
            first, *others = ranks[name]
            curve = _changes([first, *others[::-every][::-1]])
            ends = [step for step, _ in curve[1:]] + [last]
            for (step, rank), end in zip(curve, ends, strict=True):
                right, top, bottom = max(end, step + last / 500), i - 0.43, i + 0.43
                bars[_level(rank, low, high)].append([(step, bottom), (right, bottom), (right, top), (step, top)])
        for colour, of_level in zip(_RAMP, bars, strict=True):
            if of_level:  # one shape: thousands of patches take minutes
                shape = Path.make_compound_path_from_polys(np.array(of_level, float))
                ax.add_patch(PathPatch(shape, color=colour, linewidth=0))
        levels = range(round(low), round(high) + 1, max(1, round((high - low) / 6)))
        legend = [Patch(color=_RAMP[_level(rank, low, high)], label=str(rank), linewidth=0) for rank in levels]
        labelled = labels.keys() if len(ranks) <= 64 else places.firsts()
        shown = {i: label for i, (name, label) in enumerate(labels.items()) if name in labelled}
        ax.set_yticks(list(shown), list(shown.values()))
        ax.set_ylim(len(ranks) - 0.5, -0.5)
        ax.set_xlim(0, max(last, 1))
        ax.set_xlabel("step")
        _bare(ax)
        figure.legend(
            handles=legend, loc="outside lower left", ncols=16, handlelength=1, handleheight=1, columnspacing=1
        )
    return figure


def spectra(sigmas: Mapping[str, Sequence[float]], title: str) -> Figure:
    """The singular values of every update in descending order: one line per adapter, one colour per kind of layer.

    Args:
        sigmas: The singular values by adapter, descending.
        title: The title of the figure.
    """
    points = {name: [(i, v) for i, v in enumerate(sigma, 1) if v > 0] for name, sigma in sigmas.items()}
    with matplotlib.rc_context(_STYLE):
        figure, ax = _axes(title, (_NARROW, 2.9))
        lines = _by_kind(ax, points)
        _finish(figure, ax, lines, "index of the singular value", single=False)
    return figure


def tails(sigmas: Mapping[str, Sequence[float]], tau: float | None, title: str) -> Figure:
    """What part of each update (Frobenius norm) its first directions leave out, with tau as a line.

    A retraction keeps the fewest directions whose point lies on the line or below, if a budget does not ask for fewer.

    Args:
        sigmas: The singular values by adapter, descending.
        tau: The relative tolerance, if it is known.
        title: The title of the figure.
    """
    points = {}
    for name, sigma in sigmas.items():
        squares = [value**2 for value in sigma]
        left = [sum(squares[rank:]) for rank in range(len(squares))]
        points[name] = [(rank, (rest / left[0]) ** 0.5) for rank, rest in enumerate(left) if rest > 0]
    with matplotlib.rc_context(_STYLE):
        figure, ax = _axes(title, (_NARROW, 2.9))
        lines = _by_kind(ax, points)
        if tau:
            ax.axhline(tau, color=COLOURS["ink"], linewidth=1, linestyle="--")
            ax.annotate(f"tau {tau:g}", (0, tau), (2, 2), textcoords="offset points", color=COLOURS["ink"])
        _finish(figure, ax, lines, "directions kept", single=False)
    return figure


def _by_kind(ax: Axes, points: Mapping[str, Curve]) -> dict[str, Line2D]:
    """A thin line for each adapter on a logarithmic scale, with the colour of its kind; one line of each kind."""
    places = RankMap.of(points)
    lines: dict[str, Line2D] = {}
    for i, (kind, label) in enumerate(places.short_kinds().items()):
        for name in places.of_kind(kind):
            (lines[label],) = ax.plot([x for x, _ in points[name]], [y for _, y in points[name]])
            lines[label].set(color=_SERIES[i % 8], alpha=0.7, linewidth=1, marker=".", markersize=3)
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0) if high < 100 * low else (1.0,)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))  # matplotlib's own writes formulas
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return lines


def svg(figure: Figure, alt: str, salt: str) -> str:
    """A figure as an element of a page whose style defines the variables of ``COLOURS``.

    Args:
        figure: To draw.
        alt: What it shows, in words.
        salt: Unique on the page, for the names inside.
    """
    file = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": salt}), warnings.catch_warnings():
        # The page has the text itself, and whoever reads it has a font for it.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from")
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = re.search(r"<svg.*</svg>", file.getvalue(), re.S)
    assert text is not None
    drawn = re.sub(r"<metadata>.*?</metadata>\s*", "", text[0], flags=re.S)
    drawn = re.sub(r"<!--.*?-->\s*", "", drawn, flags=re.S)
    drawn = re.sub(r'<g id="[^"]*"', "<g", drawn)
    drawn = re.sub(r' xmlns(:xlink)?="[^"]*"', "", drawn)
    for name, colour in COLOURS.items():
        drawn = drawn.replace(colour, f"var(--{name})")
    width, height = (72 * inches for inches in figure.get_size_inches())
    head = f'<svg viewBox="0 0 {width:g} {height:g}" width="{width * 4 / 3:.0f}" role="img" aria-label="{alt}"'
    return re.sub(r"<svg[^>]*", lambda _: head, drawn, count=1)


def thin(curve: Curve) -> Curve:
    """At most some hundred points of a curve, each the mean of its neighbours.

    Example:
        >>> len(thin([(step, 1.0) for step in range(10_000)])) <= 400
        True
    """
    size = -(-len(curve) // _POINTS)
    parts = [curve[i : i + size] for i in range(0, len(curve), size)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def _axes(title: str, size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    ax = figure.add_subplot()
    ax.set_title(title)
    return figure, ax


def _finish(
    figure: Figure,
    ax: Axes,
    lines: Mapping[str, Line2D],
    xlabel: str = "step",
    single: bool = True,
    named: bool | None = None,
) -> None:
    """Label the axis, and the lines: where they end if each name has a single line, and else in a legend."""
    ax.set_xlabel(xlabel)
    ax.tick_params(length=0)
    named = len(lines) > 1 if named is None else named
    if single and named and len(lines) <= _DIRECT and max(map(len, lines)) <= _SHORT:
        _label_ends(ax, lines)
    elif named:
        columns = max(1, min(len(lines), 56 // (max(map(len, lines)) + 5)))
        figure.set_figheight(figure.get_figheight() + 0.17 * (-(-len(lines) // columns) - 1))  # a line of it is no loss
        # By name: matplotlib leaves out labels that begin with an underscore, unless it is given them.
        figure.legend(lines.values(), lines.keys(), loc="outside lower left", ncols=columns, columnspacing=1.2)


def _label_ends(ax: Axes, lines: Mapping[str, Line2D]) -> None:
    """Write the name of each line where it ends, apart from each other, so that lines in one place have all theirs."""
    ax.autoscale_view()  # else the limits are those of an empty picture until it is drawn
    to_axes = ax.transScale + ax.transLimits
    ends = {label: to_axes.transform(line.get_xydata()[-1])[1] for label, line in lines.items()}  # type: ignore[index]
    gap = 0.075
    order = sorted(ends, key=lambda label: ends[label])
    places: list[float] = []
    for label in order:
        places.append(max(ends[label], places[-1] + gap) if places else max(ends[label], 0.0))
    highest = 1.0
    for i in reversed(range(len(places))):
        places[i] = highest = min(places[i], highest)
        highest -= gap
    for label, place in zip(order, places, strict=True):
        ax.text(1.02, place, label, transform=ax.transAxes, va="center", color=lines[label].get_color())


def _seen(line: Line2D, others: Mapping[str, Line2D]) -> Line2D:
    """The line, with gaps if it would hide one of the others."""
    hidden = sum(np.array_equal(line.get_xydata(), other.get_xydata()) for other in others.values())
    if hidden:
        line.set_linestyle((3.0 * hidden, (3.0, 3.0 * hidden)))
    return line


def _dashes(i: int) -> str:
    return ("-", "--")[i // 8 % 2]  # there are eight colours


def _bare(ax: Axes) -> None:
    ax.grid(False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def _cell(x: int, y: int, level: int) -> Rectangle:
    return Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, facecolor=_RAMP[level], linewidth=0)


def _level(value: float, low: float, high: float) -> int:
    return round((value - low) / (high - low) * (len(_RAMP) - 1)) if high > low else len(_RAMP) // 2


def _changes(curve: Curve) -> Curve:
    return [point for i, point in enumerate(curve) if i == 0 or point[1] != curve[i - 1][1]]


def _mean(of_kind: Sequence[Curve]) -> Curve:
    """The mean of curves at the steps that they have in common."""
    tables = [dict(reversed(curve)) for curve in of_kind]  # of two points at step 0 the start
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    return [(step, sum(table[step] for table in tables) / len(tables)) for step in steps]
