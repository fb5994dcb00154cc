"""Many runs, several at a time, each appended to a file of results as it ends and never repeated."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.shared import harness, tasks
from benchmarks.shared.methods import Method
from benchmarks.shared.paths import GLUE_FOLDER, ROOT
from benchmarks.shared.results import Record, machine
from benchmarks.shared.summary import best_lr
from benchmarks.shared.task import Task

_CHANGES_NO_RESULT = ("jobs", "glue", "output", "document")  # arguments that are left out of the recorded command
KEY = ("task", "steps", "method", "settings", "warmup", "lr", "seed")  # what tells one run from another


@dataclass(frozen=True)
class Planned:
    """A run that a sweep is to make.

    Attributes:
        task: Name of the task.
        steps: Steps of the run.
        name: Name of the method in the results.
        method: The method.
        lr: Learning rate.
        seed: Seed.
        load: Returns the task of this name, from the folder of GLUE; by default one of ``tasks``.
    """

    task: str
    steps: int
    name: str
    method: Method
    lr: float
    seed: int
    load: Callable[[str, Path], Task] | None = None

    def description(self) -> Record:
        """Everything that is known about the run before it is made."""
        return {
            "task": self.task,
            "steps": self.steps,
            "method": self.name,
            "settings": self.method.settings(),
            "warmup": harness.warmup(),
            "lr": self.lr,
            "seed": self.seed,
        }


def read(path: Path) -> list[Record]:
    """The runs in a file, each of them once; none if the file does not exist."""
    lines = path.read_text().splitlines() if path.exists() else []
    return list({key(record): record for record in map(json.loads, lines)}.values())


@dataclass(frozen=True)
class Sweep:
    """Makes the runs that a file does not hold yet.

    Attributes:
        path: File of results, with one line per run.
        command: The command, which is kept with the results.
        jobs: Number of processes, with one thread each.
        glue: Folder of GLUE.
    """

    path: Path
    command: str
    jobs: int = 2
    glue: Path = GLUE_FOLDER

    def make(self, planned: Sequence[Planned]) -> list[Record]:
        """Make the runs that are missing, print each as it ends and append it to the file.

        Returns:
            The runs, in the order of the plan.
        """
        console = Console()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        keys = [key(run.description()) for run in planned]
        there = {key(record) for record in read(self.path)}
        for record in self._new([run for run, of_run in zip(planned, keys, strict=True) if of_run not in there]):
            with self.path.open("a") as file:
                file.write(json.dumps(record | {"command": self.command}) + "\n")
            what = f"{record['task']} {record['method']} lr {record['lr']:g} seed {record['seed']}"
            console.print(f"{what}: {record['score']:.4f} ({record['seconds']:.0f} s, {record['parameters']:,})")
        by_key = {key(record): record for record in read(self.path)}
        return [by_key[of_run] for of_run in keys]

    def search(self, planned: Sequence[Planned], seeds: int) -> list[Record]:
        """Make the runs, and then more seeds at the best learning rate of each method on each task.

        While the best learning rate lies at the edge of those tried, the next one beyond that edge is tried as well.

        Args:
            planned: Runs with seed 0, whose learning rates form geometric steps.
            seeds: Number of seeds at the best learning rate, seed 0 included.
        """
        swept = self.make(planned)
        pairs = {(run.task, run.name): run for run in planned}

        def rates(pair: tuple[str, str]) -> tuple[float, list[float]]:
            of_pair = [r for r in swept if (r["task"], r["method"]) == pair]
            return best_lr(of_pair), sorted(r["lr"] for r in of_pair)

        while beyond := [replace(run, lr=lr) for pair, run in pairs.items() if (lr := beyond_edge(*rates(pair)))]:
            swept += self.make(beyond)
        return swept + self.repeat(planned, swept, seeds)

    def repeat(self, planned: Sequence[Planned], swept: Sequence[Record], seeds: int) -> list[Record]:
        """Make the runs with more seeds at the best learning rate of each method on each task.

        Args:
            planned: The runs that were planned, with seed 0.
            swept: What came of them.
            seeds: Number of seeds at the best learning rate, seed 0 included.
        """
        more = []
        for pair, run in {(run.task, run.name): run for run in planned}.items():
            lr = best_lr(r for r in swept if (r["task"], r["method"]) == pair)
            more += [replace(run, lr=lr, seed=seed) for seed in range(1, seeds)]
        return self.make(more)

    def _new(self, planned: Sequence[Planned]) -> Iterator[Record]:
        pool = ProcessPoolExecutor(self.jobs, mp_context=get_context("spawn"))
        try:
            for future in as_completed([pool.submit(train, run, self.glue) for run in planned]):
                yield future.result()
        finally:  # an interruption loses the runs in progress and not those that have ended
            pool.shutdown(cancel_futures=True)


def beyond_edge(best: float, rates: Sequence[float]) -> float | None:
    """The next learning rate to try, to one digit, where the best one lies at an edge of those that were tried.

    It is as far from the best one as that is from its neighbour.

    Example:
        >>> beyond_edge(0.01, [0.001, 0.003, 0.01]), beyond_edge(0.003, [0.001, 0.003, 0.01])
        (0.03, None)
    """
    if len(rates) < 2 or rates[0] < best < rates[-1]:
        return None
    neighbour = rates[1] if best == rates[0] else rates[-2]
    return float(f"{best**2 / neighbour:.1g}")


def train(planned: Planned, glue: Path) -> Record:
    """Make one run on one thread."""
    torch.set_num_threads(1)
    load = planned.load or tasks.load
    task = replace(load(planned.task, glue), steps=planned.steps)
    result = harness.run(task, planned.method, planned.lr, planned.seed)
    return {**planned.description(), **result, "machine": machine()}


def key(record: Record) -> str:
    """What tells a run from all others; a run that is there with the same key is not made again."""
    return json.dumps([record[name] for name in KEY], sort_keys=True)


def make_parser(description: str | None, names: Sequence[str], output: Path) -> ArgumentParser:
    """A parser of the arguments that every sweep takes.

    Args:
        description: What the command does.
        names: Default of ``--tasks``.
        output: Default of ``--output``, the file of results.
    """
    parser = parser_of_runs(description, names, output)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="instead of each task's own")
    return parser


def parser_of_runs(description: str | None, names: Sequence[str], output: Path) -> ArgumentParser:
    """A parser of the arguments of :func:`sweep_of`, and of the tasks.

    Args:
        description: What the command does.
        names: Default of ``--tasks``.
        output: Default of ``--output``, the file of results.
    """
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=(*tasks.IMAGE_TASKS, *tasks.TEXT_TASKS), default=list(names))
    parser.add_argument("--jobs", type=int, default=2, help="number of processes, with one thread each")
    parser.add_argument("--glue", type=Path, default=GLUE_FOLDER, help="folder of GLUE in the official layout")
    parser.add_argument("--output", type=Path, default=output)
    return parser


def start(script: Path, args: Namespace) -> tuple[Sweep, dict[str, int]]:
    """The sweep that was asked for, and the number of steps of each task.

    Args:
        script: The script that was started, for the record.
        args: Arguments from :func:`make_parser`.
    """
    loaded = {
        name: tasks.load(name, args.glue).steps for name in args.tasks
    }  # this also pretrains held_out's model, once
    steps = {name: args.steps or of_task for name, of_task in loaded.items()}
    return sweep_of(script, args), steps


def sweep_of(script: Path, args: Namespace) -> Sweep:
    """The sweep that was asked for.

    Args:
        script: The script that was started, for the record.
        args: Arguments from :func:`parser_of_runs` or :func:`make_parser`.
    """
    return Sweep(args.output, command(script, args), args.jobs, args.glue)


def command(script: Path, args: Namespace) -> str:
    """The command that was given, without the arguments that change no result."""
    given = {name: value for name, value in vars(args).items() if value is not None and name not in _CHANGES_NO_RESULT}
    words = [["--" + name, *map(str, value if isinstance(value, list) else [value])] for name, value in given.items()]
    return " ".join(["python", script.resolve().relative_to(ROOT).as_posix(), *chain.from_iterable(words)])
