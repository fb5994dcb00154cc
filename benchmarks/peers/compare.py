"""The methods side by side: a sweep finds the learning rate of each, and more seeds follow at the best one.

    python benchmarks/peers/compare.py
    python benchmarks/peers/compare.py --tasks mrpc stsb --methods geolora lora full --seeds 5

Results are appended to ``benchmarks/results/compare.jsonl``, one line per run. A run that is there already with
the same settings is not repeated: a sweep that was interrupted continues, and another command adds methods or tasks.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is found from where this script lies

from collections.abc import Sequence

from rich.console import Console

from benchmarks.peers import comparison
from benchmarks.shared import sweep
from benchmarks.shared.methods import LRS, METHODS
from benchmarks.shared.paths import RESULTS


def main(arguments: Sequence[str] | None = None) -> None:
    parser = sweep.make_parser(__doc__, ["digits", "held_out"], RESULTS / "compare.jsonl")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--lrs", type=float, nargs="+", help="instead of each method's own")
    args = parser.parse_args(arguments)

    runs, steps = sweep.start(Path(__file__), args)
    planned = [
        sweep.Planned(task, steps[task], method, METHODS[method], lr, 0)
        for task in args.tasks
        for method in args.methods
        for lr in args.lrs or LRS[method]
    ]
    Console().print(comparison.table(runs.search(planned, args.seeds)))


if __name__ == "__main__":
    main()
