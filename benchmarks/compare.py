"""The methods side by side: the learning rate of each by the same sweep, then more seeds at the best one.

    python benchmarks/compare.py
    python benchmarks/compare.py --tasks mrpc stsb --methods geolora lora full --seeds 5

Results are appended to ``benchmarks/results/compare.jsonl``, a line a run. A run that is there already, with the same
settings, is not repeated: a sweep that was interrupted goes on, and another command adds methods or tasks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import harness
import report
import tasks
import torch
from methods import LRS, METHODS
from rich.console import Console

KEY = ("task", "steps", "method", "settings", "lr", "seed")  # what tells one run from another

Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """The runs in a file; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def key(record: Record) -> str:
    """What tells one run from another, as text."""
    return json.dumps([record[name] for name in KEY], sort_keys=True)


def plan(task: str, steps: int, method: str, lr: float, seed: int) -> Record:
    """The description of a run that is to be made."""
    return {
        "task": task,
        "steps": steps,
        "method": method,
        "settings": METHODS[method].settings(),
        "lr": lr,
        "seed": seed,
    }


def one(planned: Record, glue: Path) -> Record:
    """Make a run, on one thread."""
    torch.set_num_threads(1)
    task = replace(tasks.load(planned["task"], glue), steps=planned["steps"])
    result = harness.run(task, METHODS[planned["method"]], planned["lr"], planned["seed"])
    return {**planned, **result, "machine": harness.machine()}


def make(planned: Iterable[Record], path: Path, glue: Path, jobs: int, command: str) -> Iterator[Record]:
    """Make the runs that a file does not hold yet, and append each as it ends.

    Args:
        planned: From :func:`plan`.
        path: File of results, a line a run.
        glue: Folder of GLUE.
        jobs: Processes at a time.
        command: What was asked for, to be kept with the results.

    Yields:
        The new runs.
    """
    there = {key(record) for record in read(path)}
    missing = [record for record in planned if key(record) not in there]
    if not missing:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(one, record, glue) for record in missing]):
            record = future.result() | {"command": command}
            with path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            yield record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = (*tasks.IMAGE_TASKS, *tasks.TEXT_TASKS)
    parser.add_argument("--tasks", nargs="+", choices=everything, default=tasks.IMAGE_TASKS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the best learning rate; the sweep has one")
    parser.add_argument("--lrs", type=float, nargs="+", help="instead of each method's own")
    parser.add_argument("--steps", type=int, help="instead of each task's own")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, of one thread each")
    parser.add_argument("--glue", type=Path, default=tasks.GLUE_FOLDER, help="folder of GLUE in the official layout")
    parser.add_argument("--output", type=Path, default=report.RESULTS / "compare.jsonl")
    args = parser.parse_args()

    console = Console()
    command = f"python benchmarks/compare.py --tasks {' '.join(args.tasks)} --methods {' '.join(args.methods)}"
    steps = {name: args.steps or tasks.load(name, args.glue).steps for name in args.tasks}  # also pretrains held_out's
    pairs = [(name, method) for name in args.tasks for method in args.methods]
    sweep = [plan(name, steps[name], m, lr, 0) for name, m in pairs for lr in args.lrs or LRS[m]]
    _show(make(sweep, args.output, args.glue, args.jobs, command), console)

    wanted = {key(record) for record in sweep}
    swept = [record for record in read(args.output) if key(record) in wanted]
    best = {pair: report.best_lr(r for r in swept if (r["task"], r["method"]) == pair) for pair in pairs}
    more = [plan(name, steps[name], m, best[name, m], seed) for name, m in pairs for seed in range(1, args.seeds)]
    _show(make(more, args.output, args.glue, args.jobs, command), console)

    wanted |= {key(record) for record in more}
    console.print(report.table([record for record in read(args.output) if key(record) in wanted]))


def _show(records: Iterator[Record], console: Console) -> None:
    for record in records:
        what = f"{record['task']} {record['method']} lr {record['lr']:g} seed {record['seed']}"
        console.print(f"{what}: {record['score']:.4f} ({record['seconds']:.0f} s, {record['parameters']:,})")


if __name__ == "__main__":
    main()
