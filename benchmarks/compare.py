"""The methods side by side: the learning rate of each by the same sweep, then more seeds at the best one.

    python benchmarks/compare.py
    python benchmarks/compare.py --tasks mrpc stsb --methods geolora lora full --seeds 5

Results are appended to ``benchmarks/results/compare.jsonl``, a line a run. A run that is there already, with the same
settings, is not repeated: a sweep that was interrupted goes on, and another command adds methods or tasks.
"""

from __future__ import annotations

from collections.abc import Sequence

import report
import sweep
import tasks
from methods import LRS, METHODS
from rich.console import Console


def main(arguments: Sequence[str] | None = None) -> None:
    parser = sweep.parser(__doc__, tasks.IMAGE_TASKS, sweep.RESULTS / "compare.jsonl")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--lrs", type=float, nargs="+", help="instead of each method's own")
    args = parser.parse_args(arguments)

    runs, steps = sweep.begin("compare", args)
    planned = [
        sweep.Planned(task, steps[task], method, METHODS[method], lr, 0)
        for task in args.tasks
        for method in args.methods
        for lr in args.lrs or LRS[method]
    ]
    Console().print(report.table(runs.search(planned, args.seeds)))


if __name__ == "__main__":
    main()
