"""Many runs, several at a time, into a file of results that is never made twice."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import harness
import tasks
import torch
from methods import Method
from rich.console import Console

RESULTS = Path(__file__).parent / "results"
KEY = ("task", "steps", "method", "settings", "lr", "seed")  # what tells one run from another

Record = dict[str, Any]


@dataclass(frozen=True)
class Planned:
    """A run that is to be made.

    Attributes:
        task: Name of the task.
        steps: Steps of the run.
        name: What the method is called in the results.
        method: The method.
        lr: Learning rate.
        seed: Seed.
    """

    task: str
    steps: int
    name: str
    method: Method
    lr: float
    seed: int

    def description(self) -> Record:
        """What is known of the run before it is made."""
        values = (self.task, self.steps, self.name, self.method.settings(), self.lr, self.seed)
        return dict(zip(KEY, values, strict=True))


def read(path: Path) -> list[Record]:
    """The runs in a file; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def found(planned: Iterable[Planned], path: Path) -> list[Record]:
    """Those of the planned runs that a file holds, in the order of the plan."""
    there = {_key(record): record for record in read(path)}
    return [there[key] for run in planned if (key := _key(run.description())) in there]


def make(
    planned: Sequence[Planned], path: Path, command: str, jobs: int = 2, glue: Path = tasks.GLUE_FOLDER
) -> list[Record]:
    """Make the runs that a file does not hold yet, print each as it ends and append it to the file.

    Args:
        planned: The runs.
        path: File of results, a line a run.
        command: What was asked for, to be kept with the results.
        jobs: Processes at a time, of one thread each.
        glue: Folder of GLUE.

    Returns:
        All the runs, in the order of the plan.
    """
    console = Console()
    path.parent.mkdir(parents=True, exist_ok=True)
    for record in _new(planned, path, jobs, glue):
        with path.open("a") as file:
            file.write(json.dumps(record | {"command": command}) + "\n")
        what = f"{record['task']} {record['method']} lr {record['lr']:g} seed {record['seed']}"
        console.print(f"{what}: {record['score']:.4f} ({record['seconds']:.0f} s, {record['parameters']:,})")
    return found(planned, path)


def _new(planned: Sequence[Planned], path: Path, jobs: int, glue: Path) -> Iterator[Record]:
    there = {_key(record) for record in read(path)}
    missing = [run for run in planned if _key(run.description()) not in there]
    if not missing:
        return
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
    try:
        for future in as_completed([pool.submit(one, run, glue) for run in missing]):
            yield future.result()
    finally:  # an interruption loses the runs under way, not those that have ended
        pool.shutdown(cancel_futures=True)


def one(planned: Planned, glue: Path) -> Record:
    """Make a run, on one thread."""
    torch.set_num_threads(1)
    task = replace(tasks.load(planned.task, glue), steps=planned.steps)
    result = harness.run(task, planned.method, planned.lr, planned.seed)
    return {**planned.description(), **result, "machine": harness.machine()}


def _key(record: Record) -> str:
    return json.dumps([record[name] for name in KEY], sort_keys=True)
