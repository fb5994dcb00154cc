"""The methods side by side: the learning rate of each by the same sweep, then more seeds at the best one.

    python benchmarks/compare.py
    python benchmarks/compare.py --tasks mrpc stsb --methods geolora lora full --seeds 5

Results are appended to ``benchmarks/results/compare.jsonl``, a line a run. A run that is there already, with the same
settings, is not repeated: a sweep that was interrupted goes on, and another command adds methods or tasks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import report
import tasks
from methods import LRS, METHODS
from rich.console import Console
from sweep import RESULTS, Planned, make


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = (*tasks.IMAGE_TASKS, *tasks.TEXT_TASKS)
    parser.add_argument("--tasks", nargs="+", choices=everything, default=tasks.IMAGE_TASKS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the best learning rate; the sweep has one")
    parser.add_argument("--lrs", type=float, nargs="+", help="instead of each method's own")
    parser.add_argument("--steps", type=int, help="instead of each task's own")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, of one thread each")
    parser.add_argument("--glue", type=Path, default=tasks.GLUE_FOLDER, help="folder of GLUE in the official layout")
    parser.add_argument("--output", type=Path, default=RESULTS / "compare.jsonl")
    args = parser.parse_args(arguments)

    steps = {name: args.steps or tasks.load(name, args.glue).steps for name in args.tasks}  # also pretrains held_out's
    pairs = [(name, method) for name in args.tasks for method in args.methods]
    command = f"python benchmarks/compare.py --tasks {' '.join(args.tasks)} --methods {' '.join(args.methods)}"

    def planned(task: str, method: str, lr: float, seed: int) -> Planned:
        return Planned(task, steps[task], method, METHODS[method], lr, seed)

    sweep = [planned(*pair, lr, 0) for pair in pairs for lr in args.lrs or LRS[pair[1]]]
    swept = make(sweep, args.output, command, args.jobs, args.glue)
    best = {pair: report.best_lr(r for r in swept if (r["task"], r["method"]) == pair) for pair in pairs}
    more = [planned(*pair, best[pair], seed) for pair in pairs for seed in range(1, args.seeds)]
    Console().print(report.table(swept + make(more, args.output, command, args.jobs, args.glue)))


if __name__ == "__main__":
    main()
