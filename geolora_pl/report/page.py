"""The page of a report: what runs found, in one file of HTML that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files

from geolora_pl.report import figures, html
from geolora_pl.report.checkpoints import checkpoints_table, spectra
from geolora_pl.report.classes import classes
from geolora_pl.report.drawn import drawn_pictures
from geolora_pl.report.identity import identity
from geolora_pl.report.metrics import (
    ADAPTATION_TIME,
    ADAPTER_PARAMS,
    ENERGY_KEPT,
    GRADIENT_NORM,
    LEARNING_RATE,
    LR_MONITOR,
    MEAN_RANK,
    ORTHONORMALITY_DEFECT,
)
from geolora_pl.report.rank_map import RankMap, depth_label
from geolora_pl.report.runs import Curve, Run
from geolora_pl.report.scores import best, is_of_validation, split_of

GENERATOR = "geolora_pl report"  # by which a report knows another
_FIGURES = 24  # of learning curves, a quarter of a second each; the rest are in a table
_COLUMN = 4.6  # inches: what is wider gets a line of its own
_OURS = ((ADAPTER_PARAMS, "adapter parameters"), (MEAN_RANK, "mean rank"))
_OF_RETRACTIONS = ((ENERGY_KEPT, "share of energy kept by a retraction"), (ADAPTATION_TIME, "seconds of a retraction"))
_OF_HEALTH = ((ORTHONORMALITY_DEFECT, "largest orthonormality defect of the bases"),)


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
    shared = [name for name in scores if split_of(name) != "train"] or list(scores)
    differing = [
        name
        for name in dict.fromkeys(name for run in runs for name in run.settings)
        if len({str(run.settings.get(name)) for run in runs}) > 1
    ]
    head = ["run", *shared, "adapter parameters", "mean rank", "steps", *differing]
    rows = [
        [
            run.name,
            *(html.number(_last(run.scores.get(name))) for name in shared),
            html.number(_last(run.curves.get(ADAPTER_PARAMS))),
            html.number(_last(run.curves.get(MEAN_RANK))),
            html.number(_steps(run)),
            *(str(run.settings.get(name, "")) for name in differing),
        ]
        for run in runs
    ]
    first = sorted(scores, key=lambda name: not _is_evaluated([name]))
    drawn = [
        html.curves(found, title, f"compare-{name}")
        for name, title in [*zip(first[:_FIGURES], first, strict=False), *_OURS]
        if any((found := {run.name: _line(run.curves.get(name, ())) for run in runs}).values())
    ]
    table = html.table(head, rows, "Runs, at their ends")
    pictures = html.row(drawn)
    if len(first) > _FIGURES:
        pictures += f"<p>{len(first) - _FIGURES} further metrics are in the sections of the runs</p>"
    return f'<section aria-labelledby="compared"><h2 id="compared">Comparison</h2>{table}{pictures}</section>'


def _run(run: Run, number: int, alone: bool) -> str:
    h, salt = "h2" if alone else "h3", f"run-{number}"
    parts = [f"<h2>{escape(run.name)}</h2>"] if not alone else []
    parts += [_identity(run), _facts(run)]
    kinds = _by_kind(run.scores)
    first = sorted(kinds, key=lambda kind: not _is_evaluated(kinds[kind]))
    drawn = [html.curves(kinds[kind], kind, f"{salt}-{kind}") for kind in first[:_FIGURES]]
    if drawn := drawn + _optimization(run, salt):
        parts.append(f"<{h}>Learning curves</{h}>{html.row(drawn)}")
    if rest := [(name, curve) for kind in first[_FIGURES:] for name, curve in kinds[kind].items()]:
        parts.append(_courses(rest))
    if run.confusion is not None:
        parts.append(f"<{h}>Classes</{h}>{classes(run.confusion)}")
    if drawn_by_run := drawn_pictures(run.folder):
        parts.append(f"<{h}>Drawn images</{h}>{drawn_by_run}")
    if run.ranks:
        parts += [f"<{h}>Ranks</{h}>", _ranks(run, salt)]
    if numbers := _numbers(run, _OF_RETRACTIONS, salt):
        parts.append(f"<{h}>Retractions</{h}>{html.row(numbers)}")
    if numbers := _numbers(run, _OF_HEALTH, salt):
        parts.append(html.fold("Rounding errors", html.row(numbers)))
    parts.append(_files(run, h))
    return f'<section id="{salt}" aria-label="{escape(run.name)}">{"".join(parts)}</section>'


def _identity(run: Run) -> str:
    parts = [f"<span>{escape(part)}</span>" for part in identity(run)]
    return f'<p class="identity">{" ".join(parts)}</p>' if parts else ""


def _facts(run: Run) -> str:
    facts = {name: html.number(_last(curve)) for name, curve in run.scores.items() if split_of(name) == "test"}
    for name, curve in run.scores.items():
        if is_of_validation(name):
            facts[name] = f"{html.number(_last(curve))} <small>{_extremes(name, curve, run)}</small>"
    for name, title in _OURS:
        if course := run.curves.get(name):
            facts[title] = f"{html.number(course[-1][1])} <small>from {html.number(course[0][1])}</small>"
    facts["steps"] = html.number(_steps(run))
    tiles = "".join(f"<div><dt>{escape(name)}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    return f"<dl>{tiles}</dl>"


def _extremes(name: str, curve: Curve, run: Run) -> str:
    """The best value, or both ends where nobody knows which is better."""
    if found := best(name, curve, run.record):
        return f"best {html.number(found[1])} at step {found[0]:,}"
    (low_at, low), (high_at, high) = (end(curve, key=lambda point: point[1]) for end in (min, max))
    return f"lowest {html.number(low)} at step {low_at:,}, highest {html.number(high)} at step {high_at:,}"


def _optimization(run: Run, salt: str) -> list[str]:
    """Learning rates, each as a part of its highest, and the norm of the gradients."""
    logged = {name.removeprefix(LEARNING_RATE): c for name, c in run.curves.items() if name.startswith(LEARNING_RATE)}
    # Those of a LearningRateMonitor serve as well.
    of_groups = logged or {name: c for name, c in run.curves.items() if name.startswith(LR_MONITOR)}
    rates: dict[str, Curve] = {}
    for name, curve in of_groups.items():
        if len(curve) > 1 and (peak := max(value for _, value in curve)) > 0:
            rates[f"{name} {peak:.3g}"] = [(step, value / peak) for step, value in curve]
    drawn = [html.curves(rates, "learning rate, by its highest", f"{salt}-lr")] if rates else []
    return drawn + _numbers(run, ((GRADIENT_NORM, "gradient norm, after clipping"),), salt)


def _numbers(run: Run, which: Iterable[tuple[str, str]], salt: str) -> list[str]:
    return [
        html.curves({name: run.curves[name]}, title, f"{salt}-{name}")
        for name, title in which
        if len(run.curves.get(name, ())) > 1
    ]


def _ranks(run: Run, salt: str) -> str:
    last = {name: round(curve[-1][1]) for name, curve in run.ranks.items()}
    places = RankMap.of(last)
    low, high = min(last, key=lambda n: last[n]), max(last, key=lambda n: last[n])
    extremes = f"from {last[low]} ({low}) to {last[high]} ({high})"
    table = html.table(
        ["layers", *(depth_label(depth) or "rank" for depth in places.depths)],
        [
            [kind, *("" if rank is None else f"{rank:g}" for rank in row)]
            for kind, row in zip(places.kinds, places.rows(last), strict=True)
        ],
        "Ranks at the end",
    )
    over_time = f"Mean rank over steps by kind of layer: {_kinds_in_words(run.ranks)}"
    every = f"Rank of each of {len(last)} adapters over steps; at the end {extremes}"
    drawn = [html.figure(figures.ranks_over_steps(run.ranks, "mean rank over steps"), over_time, f"{salt}-over")]
    chart = figures.ranks_by_adapter(run.ranks, "rank of every adapter")
    wide = [html.figure(chart, every, f"{salt}-adapters", wide=True)]
    chart = figures.rank_map(last, "rank by layer and depth")
    deep = chart.get_size_inches()[0] > _COLUMN
    (wide if deep else drawn).insert(0, html.figure(chart, f"Rank map at the end: {extremes}", f"{salt}-map", deep))
    if params := run.curves.get(ADAPTER_PARAMS):
        drawn.append(html.curves({ADAPTER_PARAMS: params}, "adapter parameters", f"{salt}-params"))
    of_checkpoint, note = spectra(run, last, salt)
    return html.row([*drawn, *of_checkpoint]) + "".join(wide) + note + html.fold("The rank map as a table", table)


def _files(run: Run, h: str) -> str:
    parts = [f"<{h}>Files</{h}><p>In <code>{escape(str(run.folder))}</code></p>", checkpoints_table(run)]
    if run.settings:
        rows = [[name, str(value)] for name, value in run.settings.items()]
        parts.append(html.fold("Settings", html.table(["setting", "value"], rows, "config.yaml")))
    return "".join(parts)


def _by_kind(scores: Mapping[str, Curve]) -> dict[str, dict[str, Curve]]:
    """The curves by picture: ``train_loss`` and ``val_loss`` belong to ``loss``."""
    found: dict[str, dict[str, Curve]] = {}
    for name, curve in scores.items():
        kind = name[len(split_of(name)) :].lstrip("_/") or name
        if len(curve) > 1:
            found.setdefault(kind.removesuffix("_step").removesuffix("_epoch"), {})[name] = curve
    return found


def _is_evaluated(names: Iterable[str]) -> bool:
    return any(split_of(name) not in ("", "train") for name in names)


def _courses(curves: Sequence[tuple[str, Curve]]) -> str:
    rows = []
    for name, curve in curves:
        values = [value for _, value in curve]
        rows.append([name, *map(html.number, (values[0], values[-1], min(values), max(values)))])
    return html.table(["metric", "first", "last", "lowest", "highest"], rows, f"{len(rows)} further metrics")


def _kinds_in_words(ranks: Mapping[str, Curve]) -> str:
    places, words = RankMap.of(ranks), []
    for kind in places.kinds:
        ends = [ranks[name] for name in places.of_kind(kind)]
        first, last = (sum(curve[i][1] for curve in ends) / len(ends) for i in (0, -1))
        words.append(f"{kind} from {first:.1f} to {last:.1f}")
    return "; ".join(words)


def _last(curve: Curve | None) -> float | None:
    return curve[-1][1] if curve else None


def _line(curve: Curve) -> Curve:
    """A curve, or none where it is but a point."""
    return curve if len(curve) > 1 else ()


def _steps(run: Run) -> float:
    """Optimizer steps of the fit, which are counted from 0; what is logged after it has the step that never came."""
    of_fit = [curve for name, curve in run.curves.items() if split_of(name) != "test"]
    mean_rank = run.curves.get(MEAN_RANK)
    return max((curve[-1][0] for curve in ([mean_rank] if mean_rank else of_fit)), default=-1) + 1
