"""Learning-rate sweep next to PEFT's LoRA: the quickstart's digits, or SST-2 with MiniLM.

    python benchmarks/lr_sweep.py
    python benchmarks/lr_sweep.py --task sst2 --folder .../glue/SST-2 --seeds 1

Every method gets the same model, head, data order, schedule and steps. Results go to ``benchmarks/results``. SST-2
needs the extra ``bench``.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import mean, stdev
from typing import Any

import harness
import torch
from rich.console import Console
from rich.table import Table

GRIDS = {
    "digits": {
        "geolora": [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0],
        "lora": [1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
        "head": [1e-2],
    },
    "sst2": {"geolora": [1e-2, 3e-2, 1e-1, 3e-1], "lora": [3e-4, 1e-3, 3e-3, 1e-2]},
}


def one(name: str, folder: str, steps: int, method: str, lr: float, seed: int) -> dict[str, Any]:
    """One run in a process of its own, on one thread."""
    torch.set_num_threads(1)
    task = harness.digits() if name == "digits" else harness.sst2(folder, steps)
    return harness.run(task, method, lr, seed)


def table(results: list[dict[str, Any]]) -> Table:
    """Mean and spread over the seeds, a row a method and learning rate."""
    view = Table("method", "lr", "score", "spread", "loss", "parameters", "ranks")
    for method, lr in dict.fromkeys((r["method"], r["lr"]) for r in results):
        runs = [r for r in results if (r["method"], r["lr"]) == (method, lr)]
        scores = [r["score"] for r in runs]
        ranks = [rank for r in runs for rank in r.get("ranks", [])]
        view.add_row(
            method,
            f"{lr:g}",
            f"{mean(scores):.4f}",
            f"{stdev(scores):.4f}" if len(scores) > 1 else "",
            f"{mean(r['loss'] for r in runs):.4f}",
            f"{mean(r['parameters'] for r in runs):,.0f}" if "parameters" in runs[0] else "",
            f"{min(ranks)} to {max(ranks)}" if ranks else "",
        )
    return view


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=GRIDS, default="digits")
    parser.add_argument("--folder", default="", help="the folder of SST-2's train.tsv and dev.tsv")
    parser.add_argument("--steps", type=int, default=200, help="steps of SST-2")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()

    jobs = [
        (args.task, args.folder, args.steps, method, lr, seed)
        for seed in range(args.seeds)
        for method, grid in GRIDS[args.task].items()
        for lr in grid
    ]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        results = list(pool.map(one, *zip(*jobs, strict=True)))
    command = f"python benchmarks/lr_sweep.py --task {args.task} --seeds {args.seeds}"
    command += f" --folder SST-2 --steps {args.steps}" if args.task == "sst2" else ""
    path = harness.ROOT / "benchmarks" / "results" / f"lr_sweep_{args.task}.json"
    torch.set_num_threads(1)
    path.write_text(json.dumps({"command": command, "machine": harness.machine(), "results": results}, indent=1) + "\n")
    Console().print(table(results))


if __name__ == "__main__":
    main()
