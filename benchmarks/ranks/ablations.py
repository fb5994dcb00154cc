"""Why the defaults are what they are: this package with one of them changed at a time.

    python benchmarks/ranks/ablations.py

Runs are appended to ``benchmarks/results/ablations.jsonl`` and never repeated; ``docs/ablations.md`` is written from
them. A new variant is a line in ``TRIED``.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is found from where this script lies

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import get_args

from benchmarks.shared import sweep
from benchmarks.shared.methods import GeoLoRA, default_lr
from benchmarks.shared.paths import RESULTS, ROOT
from benchmarks.shared.results import Record
from benchmarks.shared.summary import best_lr, current, spread
from benchmarks.shared.sweep import Planned
from geolora_pl.training.optim import Geometry

DOCUMENT = ROOT / "docs" / "ablations.md"
FACTORS = (1 / 3, 1.0, 3.0)  # of the default learning rate, since a variant may need another one

# Each question with its variants; a variant that is the default already is left out below.
TRIED: Mapping[str, Mapping[str, GeoLoRA]] = {
    "How often should it retract?": {
        f"every {steps} steps": GeoLoRA(callback={"adapt_every": steps}) for steps in (1, 5, 50)
    },
    "How many probes should look for new directions?": {
        f"probes {number}": GeoLoRA(adapter={"probes": number}) for number in (0, 1, 2, 4)
    },
    "How much may a truncation drop?": {f"tau {tau}": GeoLoRA(callback={"tau": tau}) for tau in (0.03, 0.1, 0.2, 0.3)},
    "Do the moments have to move with the bases?": {"moments left as they are": GeoLoRA(carry_moments=False)},
    "What should one second moment stand for?": {
        geometry: GeoLoRA(optimizer={"geometry": geometry}) for geometry in get_args(Geometry)
    },
    "How long should the second moment remember?": {
        f"beta2 {beta}": GeoLoRA(optimizer={"betas": (0.9, beta)}) for beta in (0.95, 0.99, 0.999)
    },
    "Which rank should it start from?": {
        f"start rank {rank}": GeoLoRA(adapter={"init_rank": rank}) for rank in (1, 2, 4, 8, 16)
    },
    "Should the update decay?": {
        f"weight decay {decay}": GeoLoRA(optimizer={"weight_decay": decay}) for decay in (0.0, 0.01, 0.1)
    },
    "Should the ranks settle early?": {
        f"ranks change until {part}": GeoLoRA(callback={"adapt_until": part}) for part in (0.3, 0.7, 1.0)
    },
}
DEFAULT = {"the defaults": GeoLoRA()}
VARIANTS = {
    question: {name: method for name, method in tried.items() if method.settings() != GeoLoRA().settings()}
    for question, tried in TRIED.items()
}
METHODS = {**DEFAULT, **{name: method for group in VARIANTS.values() for name, method in group.items()}}
BUDGET = "budget of as many parameters as tau finds"


def plan(names: Sequence[str], steps: Mapping[str, int], lrs: Sequence[float]) -> list[Planned]:
    """The runs of the sweep, except those whose budget is known only after the defaults have run."""
    return [
        Planned(task, steps[task], name, method, lr, 0)
        for task in names
        for name, method in METHODS.items()
        for lr in lrs
    ]


def plan_budgets(records: Sequence[Record]) -> list[Planned]:
    """Runs with tau nearly off and a budget of as many parameters as the defaults end with on the same task."""
    of_default = [record for record in records if record["method"] in DEFAULT]
    return [
        Planned(
            record["task"],
            record["steps"],
            BUDGET,
            GeoLoRA(callback={"tau": 0.01, "budget": record["parameters"]}),
            record["lr"],
            record["seed"],
        )
        for record in of_default
    ]


def of_today(records: Sequence[Record]) -> list[Record]:
    """The runs that were made with the settings that the variants, or the budgets that follow from them, have today."""
    found = current(records, METHODS)
    budgets = {sweep.key(run.description()) for run in plan_budgets(found)}
    return [*found, *(record for record in records if sweep.key(record) in budgets)]


def document(records: Sequence[Record]) -> str:
    """The page of the documentation: one table per question and one row per variant, with scores and parameters."""
    if not records:
        return (
            "# Why the defaults are what they are\n\nNo run has been made with the defaults of today. "
            "Runs with earlier defaults, before there were probes, are in\n`benchmarks/results/ablations.jsonl`; "
            "`python benchmarks/ranks/ablations.py` makes those of today.\n"
        )
    names = list(dict.fromkeys(record["task"] for record in records))
    commands = dict.fromkeys(record["command"] for record in records)
    seeds, lrs = (sorted({record[key] for record in records}) for key in ("seed", "lr"))
    questions = {**VARIANTS, "Is a budget better than tau?": {BUDGET: GeoLoRA()}}
    over = f"with its spread over {len(seeds)} seeds" if len(seeds) > 1 else "with one seed"
    lines = [
        "# Why the defaults are what they are",
        "",
        f"One default is changed at a time. Every cell has the score at the best of the learning rates tried "
        f"({', '.join(f'{lr:g}' for lr in lrs)}), {over}, and below it the number of adapter parameters at the end of "
        "the training. Differences within the spread of the seeds mean nothing.",
        "",
        f"Made by {', '.join(f'`{command}`' for command in commands)}; do not edit by hand.",
    ]
    for question, variants in questions.items():
        tried = [name for name in (*DEFAULT, *variants) if any(record["method"] == name for record in records)]
        if len(tried) < 2:
            continue
        lines += ["", f"## {question}", "", f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
        for name in tried:
            cells = [_cell([r for r in records if (r["task"], r["method"]) == (task, name)]) for task in names]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(runs: Sequence[Record]) -> str:
    if not runs:
        return ""
    best = best_lr(runs)
    chosen = [run for run in runs if run["lr"] == best]
    return f"{spread([r['score'] for r in chosen])}<br>{mean(r['parameters'] for r in chosen):,.0f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = sweep.make_parser(__doc__, ("digits", "stsb"), RESULTS / "ablations.jsonl")
    parser.add_argument("--lrs", type=float, nargs="+", default=[float(f"{default_lr() * x:.1g}") for x in FACTORS])
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    args = parser.parse_args(arguments)
    runs, steps = sweep.start(Path(__file__), args)
    records = runs.search(plan(args.tasks, steps, args.lrs), args.seeds)
    records += runs.make(plan_budgets(records))
    args.document.write_text(document(records))


if __name__ == "__main__":
    main()
