"""The matrix products of the fused layer: in which layout BLAS is fast, and when a merged weight pays off.

    python benchmarks/speed/products.py

The thin products, whose width is the rank, are timed as they stand in the formulas, (rows, rank), and transposed,
(rank, rows). A training step of one layer is timed with the update merged into the weight and with the update beside
it, for more and more rows. Results go to ``benchmarks/results/products.json``.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is found from where this script lies

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from rich.console import Console

from benchmarks.shared import harness, results
from benchmarks.shared.tables import table
from geolora_pl.adapters.fused import FusedLinear

SHAPES = ((384, 384), (1536, 384), (768, 768))  # (out, in) of a layer
RANKS = (8, 16)
ROWS = 2048
PARTS = (0.25, 0.5, 1.0, 2.0, 4.0)  # multiples of the number of rows at which both forms take as many operations
LAYOUTS = ("out x in", "rank", "x V", "(V^T x^T)^T", "dy^T P", "(P^T dy)^T", "of the base's step")
FORMS = ("out x in", "rank", *(f"{part:g}" for part in PARTS))


def milliseconds(action: Callable[[], object], repeats: int) -> float:
    """Median time of an action."""
    action()
    times = []
    for _ in range(repeats):
        start = harness.now()
        action()
        times.append(harness.now() - start)
    return 1e3 * median(times)


def layouts(m: int, n: int, rank: int, repeats: int) -> dict[str, float]:
    """Milliseconds of the two thin products of K in both layouts, and of the two products of the frozen layer."""
    x, dy, W = torch.randn(ROWS, n), torch.randn(ROWS, m), torch.randn(m, n)
    V, P = torch.randn(n, rank), torch.randn(ROWS, rank)
    actions: dict[str, Callable[[], object]] = {
        "x V": lambda: x @ V,
        "(V^T x^T)^T": lambda: V.mT @ x.mT,
        "dy^T P": lambda: dy.mT @ P,
        "(P^T dy)^T": lambda: P.mT @ dy,
        "of the base's step": lambda: (x @ W.mT, dy @ W),
    }
    return {name: round(milliseconds(action, repeats), 3) for name, action in actions.items()}


def merged_over_beside(m: int, n: int, rank: int, repeats: int) -> dict[str, float]:
    """Time of a training step with a merged weight over that with the update beside it, by number of rows."""
    W, b = torch.randn(m, n), torch.randn(m)
    U, V = (torch.linalg.qr(torch.randn(size, rank)).Q for size in (m, n))
    K, L = (torch.zeros(size, rank, requires_grad=True) for size in (m, n))
    factors, found = (U, torch.eye(rank), V, K, L), {}
    for part in PARTS:
        rows = round(part * m * n / (m + n))
        x, dy = torch.randn(rows, n, requires_grad=True), torch.randn(rows, m)

        def step(merged: bool, x: torch.Tensor = x, dy: torch.Tensor = dy) -> None:
            FusedLinear.apply(x, W, b, *factors, 1.0, merged).backward(dy)

        found[f"{part:g}"] = round(
            milliseconds(partial(step, True), repeats) / milliseconds(partial(step, False), repeats), 3
        )
    return found


def rows(records: Sequence[dict[str, Any]], columns: Sequence[str]) -> list[list[str]]:
    """The cells of a table with the given columns."""
    return [[str(record[column]) for column in columns] for record in records]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, Any]]] = {"layouts": [], "forms": []}
    for m, n in SHAPES:
        for rank in RANKS:
            what = {"out x in": f"{m} x {n}", "rank": rank}
            found["layouts"].append(what | layouts(m, n, rank, args.repeats))
            found["forms"].append(what | merged_over_beside(m, n, rank, args.repeats))
    results.write("products", f"python benchmarks/speed/products.py --repeats {args.repeats}", found)
    for name, columns in (("layouts", LAYOUTS), ("forms", FORMS)):
        Console().print(table(columns, rows(found[name], columns), name))


if __name__ == "__main__":
    main()
