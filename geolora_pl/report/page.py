"""The page of a report: what runs found, in one file of HTML that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from matplotlib.figure import Figure

from geolora_pl.report import figures
from geolora_pl.report.drawn import drawn_pictures
from geolora_pl.report.metrics import ADAPTATION_TIME, ADAPTER_PARAMS, ENERGY_KEPT, MEAN_RANK, ORTHONORMALITY_DEFECT
from geolora_pl.report.rank_map import RankMap, depth_label
from geolora_pl.report.runs import Curve, Run
from geolora_pl.storage.spectra import checkpoint_spectra

GENERATOR = "geolora_pl report"  # by which a report knows another
_FIGURES = 24  # of learning curves, a quarter of a second each; the rest are in a table
_COLUMN = 4.6  # inches: what is wider gets a line of its own
_OURS = ((ADAPTER_PARAMS, "adapter parameters"), (MEAN_RANK, "mean rank"))
_OF_RETRACTIONS = (
    (ENERGY_KEPT, "share of energy kept by a retraction"),
    (ORTHONORMALITY_DEFECT, "largest orthonormality defect of the bases"),
    (ADAPTATION_TIME, "seconds of a retraction"),
)
_SPLITS = ("train", "val", "valid", "validation", "test")


def page(runs: Sequence[Run]) -> str:
    """A page about one run, or about several and how they compare.

    Args:
        runs: One at least.
    """
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs"
    several = [_comparison(runs)] if len(runs) > 1 else []
    sections = [_run(run, i, alone=len(runs) == 1) for i, run in enumerate(runs)]
    links = "".join(f'<li><a href="#run-{i}">{escape(run.name)}</a></li>' for i, run in enumerate(runs))
    navigation = f'<nav aria-label="Runs"><ul>{links}</ul></nav>' if several else ""
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f'<meta name="generator" content="{GENERATOR}">',
            f"<title>{escape(title)}</title>\n<style>\n{_style()}</style>\n</head>\n<body>",
            f"<header><h1>{escape(title)}</h1>{navigation}</header>\n<main>",
            *several,
            *sections,
            "</main>\n</body>\n</html>\n",
        ]
    )


def _style() -> str:
    light = "".join(f" --{name}: {colour};" for name, colour in figures.COLOURS.items())
    return f":root {{{light} }}\n" + files("geolora_pl.report").joinpath("page.css").read_text(encoding="utf-8")


def _comparison(runs: Sequence[Run]) -> str:
    scores = dict.fromkeys(name for run in runs for name in run.scores)
    shared = [name for name in scores if _split(name) != "train"] or list(scores)
    differing = [
        name
        for name in dict.fromkeys(name for run in runs for name in run.settings)
        if len({str(run.settings.get(name)) for run in runs}) > 1
    ]
    head = ["run", *shared, "adapter parameters", "mean rank", "steps", *differing]
    rows = [
        [
            run.name,
            *(_number(_last(run.scores.get(name))) for name in shared),
            _number(_last(run.curves.get(ADAPTER_PARAMS))),
            _number(_last(run.curves.get(MEAN_RANK))),
            _number(_steps(run)),
            *(str(run.settings.get(name, "")) for name in differing),
        ]
        for run in runs
    ]
    first = sorted(scores, key=lambda name: not _is_evaluated([name]))
    drawn = [
        _curves(found, title, f"compare-{name}")
        for name, title in [*zip(first[:_FIGURES], first, strict=False), *_OURS]
        if (found := {run.name: run.curves[name] for run in runs if len(run.curves.get(name, ())) > 1})
    ]
    table = _table(head, rows, "Runs, at their ends")
    pictures = f'<div class="figures">{"".join(drawn)}</div>'
    if len(first) > _FIGURES:
        pictures += f"<p>{len(first) - _FIGURES} further metrics are in the sections of the runs</p>"
    return f'<section aria-labelledby="compared"><h2 id="compared">Comparison</h2>{table}{pictures}</section>'


def _run(run: Run, number: int, alone: bool) -> str:
    h, salt = ("h2", "h3")[not alone], f"run-{number}"
    parts = [f"<h2>{escape(run.name)}</h2>"] if not alone else []
    parts.append(_facts(run))
    kinds = _by_kind(run.scores)
    first = sorted(kinds, key=lambda kind: not _is_evaluated(kinds[kind]))
    if drawn := [_curves(kinds[kind], kind, f"{salt}-{kind}") for kind in first[:_FIGURES]]:
        parts.append(f'<{h}>Learning curves</{h}><div class="figures">{"".join(drawn)}</div>')
    if rest := [(name, curve) for kind in first[_FIGURES:] for name, curve in kinds[kind].items()]:
        parts.append(_courses(rest))
    if drawn_by_run := drawn_pictures(run.folder):
        parts.append(f"<{h}>Drawn images</{h}>{drawn_by_run}")
    if run.ranks:
        parts += [f"<{h}>Ranks</{h}>", _ranks(run, salt)]
    if numbers := [
        _curves({name: run.curves[name]}, title, f"{salt}-{name}")
        for name, title in _OF_RETRACTIONS
        if len(run.curves.get(name, ())) > 1
    ]:
        parts.append(f'<{h}>Retractions</{h}><div class="figures">{"".join(numbers)}</div>')
    parts.append(_files(run, h))
    return f'<section id="{salt}" aria-label="{escape(run.name)}">{"".join(parts)}</section>'


def _facts(run: Run) -> str:
    facts = {name: _number(_last(curve)) for name, curve in run.scores.items() if _split(name) == "test"}
    for name, curve in run.scores.items():
        if _split(name) in ("val", "valid", "validation"):
            (low_at, low), (high_at, high) = (end(curve, key=lambda point: point[1]) for end in (min, max))
            ends = f"lowest {_number(low)} at step {low_at:,}, highest {_number(high)} at step {high_at:,}"
            facts[name] = f"{_number(_last(curve))} <small>{ends}</small>"
    for name, title in _OURS:
        if course := run.curves.get(name):
            facts[title] = f"{_number(course[-1][1])} <small>from {_number(course[0][1])}</small>"
    facts["steps"] = _number(_steps(run))
    tiles = "".join(f"<div><dt>{escape(name)}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    return f"<dl>{tiles}</dl>"


def _ranks(run: Run, salt: str) -> str:
    last = {name: round(curve[-1][1]) for name, curve in run.ranks.items()}
    places = RankMap.of(last)
    low, high = min(last, key=lambda n: last[n]), max(last, key=lambda n: last[n])
    extremes = f"from {last[low]} ({low}) to {last[high]} ({high})"
    table = _table(
        ["layers", *(depth_label(depth) or "rank" for depth in places.depths)],
        [
            [kind, *("" if rank is None else f"{rank:g}" for rank in row)]
            for kind, row in zip(places.kinds, places.rows(last), strict=True)
        ],
        "Ranks at the end",
    )
    over_time = f"Mean rank over steps by kind of layer: {_kinds_in_words(run.ranks)}"
    every = f"Rank of each of {len(last)} adapters over steps; at the end {extremes}"
    drawn = [_figure(figures.ranks_over_steps(run.ranks, "mean rank over steps"), over_time, f"{salt}-over")]
    wide = [_figure(figures.ranks_by_adapter(run.ranks, "rank of every adapter"), every, f"{salt}-adapters", wide=True)]
    chart = figures.rank_map(last, "rank by layer and depth")
    deep = chart.get_size_inches()[0] > _COLUMN
    (wide if deep else drawn).insert(0, _figure(chart, f"Rank map at the end: {extremes}", f"{salt}-map", deep))
    if params := run.curves.get(ADAPTER_PARAMS):
        drawn.append(_curves({ADAPTER_PARAMS: params}, "adapter parameters", f"{salt}-params"))
    note = ""
    if run.checkpoints:
        try:
            drawn += _spectra(run.checkpoints[-1], last, salt)
        except ValueError:
            reason = "cannot be read, or holds more than plain values: its singular values are left out"
            note = f"<p>{escape(run.checkpoints[-1].name)} {reason}</p>"
    details = f"<details><summary>The rank map as a table</summary>{table}</details>"
    return f'<div class="figures">{"".join(drawn)}</div><div class="figures wide">{"".join(wide)}</div>{note}{details}'


def _spectra(checkpoint: Path, order: Iterable[str], salt: str) -> list[str]:
    found = checkpoint_spectra(checkpoint)
    if not found:
        return []
    sigmas = {name: found[name] for name in [*filter(found.__contains__, order), *found]}  # kinds keep their colours
    largest = max((sigma[0] for sigma in sigmas.values() if sigma), default=0.0)
    chart = figures.spectra(sigmas, f"singular values in {checkpoint.name}")
    return [_figure(chart, f"Singular values of every update, the largest {largest:.3g}", f"{salt}-spectra")]


def _files(run: Run, h: str) -> str:
    rows = [[path.name, f"{path.stat().st_size / 1e6:,.1f} MB"] for path in run.checkpoints]
    parts = [f"<{h}>Files</{h}><p>In <code>{escape(str(run.folder))}</code></p>"]
    if rows:
        parts.append(_table(["checkpoint", "size"], rows, "Checkpoints, oldest first"))
    if run.settings:
        table = _table(["setting", "value"], [[k, str(v)] for k, v in run.settings.items()], "config.yaml")
        parts.append(f"<details><summary>Settings</summary>{table}</details>")
    return "".join(parts)


def _curves(series: Mapping[str, Curve], title: str, salt: str) -> str:
    alt = f"{title} over steps: " + "; ".join(f"{label} {_course(curve)}" for label, curve in series.items())
    return _figure(figures.curves(series, title), alt, salt)


def _figure(figure: Figure, alt: str, salt: str, wide: bool = False) -> str:
    drawn = figures.svg(figure, escape(alt), salt)
    scrolls = ' tabindex="0"' if wide else ""  # a small screen shows a part of it
    return f"<figure{scrolls}>{drawn}</figure>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(c)}</td>" for c in row[1:]) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table><caption>'
        f"{escape(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _split(name: str) -> str:
    first = name.replace("/", "_").partition("_")[0]
    return first if first in _SPLITS else ""


def _by_kind(scores: Mapping[str, Curve]) -> dict[str, dict[str, Curve]]:
    """The curves by picture: ``train_loss`` and ``val_loss`` belong to ``loss``."""
    found: dict[str, dict[str, Curve]] = {}
    for name, curve in scores.items():
        kind = name[len(_split(name)) :].lstrip("_/") or name
        if len(curve) > 1:
            found.setdefault(kind.removesuffix("_step").removesuffix("_epoch"), {})[name] = curve
    return found


def _is_evaluated(names: Iterable[str]) -> bool:
    return any(_split(name) not in ("", "train") for name in names)


def _courses(curves: Sequence[tuple[str, Curve]]) -> str:
    rows = []
    for name, curve in curves:
        values = [value for _, value in curve]
        rows.append([name, *map(_number, (values[0], values[-1], min(values), max(values)))])
    return _table(["metric", "first", "last", "lowest", "highest"], rows, f"{len(rows)} further metrics")


def _kinds_in_words(ranks: Mapping[str, Curve]) -> str:
    places, words = RankMap.of(ranks), []
    for kind in places.kinds:
        ends = [ranks[name] for name in places.of_kind(kind)]
        first, last = (sum(curve[i][1] for curve in ends) / len(ends) for i in (0, -1))
        words.append(f"{kind} from {first:.1f} to {last:.1f}")
    return "; ".join(words)


def _course(curve: Curve) -> str:
    (first, start), (last, end) = curve[0], curve[-1]
    return f"from {_number(start)} at step {first} to {_number(end)} at step {last}"


def _last(curve: Curve | None) -> float | None:
    return curve[-1][1] if curve else None


def _steps(run: Run) -> float:
    """Optimizer steps of the fit, which are counted from 0; what is logged after it has the step that never came."""
    of_fit = [curve for name, curve in run.curves.items() if _split(name) != "test"]
    mean_rank = run.curves.get(MEAN_RANK)
    return max((curve[-1][0] for curve in ([mean_rank] if mean_rank else of_fit)), default=-1) + 1


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value == round(value) and abs(value) >= 100 else f"{value:.4g}"
