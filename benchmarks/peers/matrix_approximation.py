r"""One matrix approximated at low rank, ``0.5 ||W - T||^2``: GeoLoRA, LoRA, and simultaneous descent on U, S and V.

    python benchmarks/peers/matrix_approximation.py

Everything is plain gradient descent in float64, and every method has its own best learning rate. Two figures are
written to ``docs/figures``, and the numbers to ``benchmarks/results``:

*   ``matrix_approximation``: a target of rank 6 with singular values from 10 to 0.1, from random starts.
*   ``stationary_points``: where a descent comes to rest. U, S and V descended at once stop wherever ``U^T G V``,
    ``G V S^T`` and ``G^T U S`` vanish, which at a singular S says nothing of ``G V`` and ``G^T U``, so that the
    projected gradient ``P(W) G`` need not vanish. The start is such a point: S is zero, and each basis sees a part of
    the target, but never both the same part (``U^T T V = 0``). The point is a saddle and not an attractor: the third
    panel shows how long it holds a start that is a little away from it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is found from where this script lies

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from statistics import median
from typing import Any

import torch
from matplotlib.axes import Axes
from rich.console import Console
from torch import Tensor, nn

from benchmarks.shared import figures, results
from benchmarks.shared.tables import table
from geolora_pl import AdapterConfig, RankAdaptiveIntegrator, inject_adapters

SIZE = 128
SPECTRUM = (10.0, 5.0, 2.0, 1.0, 0.5, 0.1)
RATES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005)
NAMES = {
    "geolora": "GeoLoRA",
    "adaptive": "GeoLoRA, rank found",
    "lora": "LoRA",
    "simultaneous": "U, S, V at once",
    "orthonormal": "U, S, V at once, kept orthonormal",
}
COLORS = dict(zip(NAMES, ("C0", "C9", "C1", "C3", "C4"), strict=True))
AT_SADDLE = ("geolora", "lora", "simultaneous", "orthonormal")
OFFS = (0.0, 1e-12, 1e-9, 1e-6, 1e-3, 1.0)  # distances of the start from the saddle
KINDS = ("loss above the least at the rank", "norm of P(W) G")
HEADER = ("method", "start", "lr", "steps to 1%", *KINDS)
FLOOR = 1e-16  # below it a loss is drawn as zero
CLOSE = 0.01  # a descent has arrived when its loss exceeds the least one by no more than this part of it

Start = tuple[Tensor, Tensor]  # orthonormal bases; the point itself is zero
Iterate = tuple[Tensor, Tensor, Tensor]  # W, and orthonormal bases of its column and row space
Curve = tuple[list[float], list[float]]  # loss above the least one, and norm of the projected gradient


def geolora(T: Tensor, start: Start, lr: float, adaptive: bool = False) -> Iterator[Iterate]:
    """Algorithm 1 of GeoLoRA, without probes, with SGD at the rank of the start, or from rank 4 with at most 16."""
    U, V = (basis[:, :4] if adaptive else basis for basis in start)
    rank = U.shape[1]
    model = nn.Sequential(nn.Linear(T.shape[1], T.shape[0], bias=False, dtype=T.dtype))
    nn.init.zeros_(model[0].weight)
    layer = inject_adapters(model, AdapterConfig(init_rank=rank, max_rank=16 if adaptive else rank, probes=0))["0"]
    with torch.no_grad():
        layer.U[:, :rank], layer.V[:, :rank] = U, V
    integrator = RankAdaptiveIntegrator(model, tau=1e-3 if adaptive else 1e-12)
    optimizer = torch.optim.SGD([layer.K, layer.L], lr=lr)
    while True:
        W = layer.delta_weight()
        yield W.detach(), layer.U.detach().clone(), layer.V.detach().clone()
        optimizer.zero_grad()
        (0.5 * (W - T).square().sum()).backward()
        optimizer.step()
        integrator.step(optimizer)


def lora(T: Tensor, start: Start, lr: float) -> Iterator[Iterate]:
    """``W = B A``, where A starts as the transpose of V and B as zero."""
    A, B = start[1].mT, torch.zeros_like(start[0])
    while True:
        yield B @ A, _basis(B), _basis(A.mT)
        G = B @ A - T
        A, B = A - lr * B.mT @ G, B - lr * G @ A.mT


def simultaneous(T: Tensor, start: Start, lr: float, orthonormal: bool = False) -> Iterator[Iterate]:
    """``W = U S V^T`` from S = 0, with a gradient step on all three; the bases are made orthonormal again on demand."""
    U, V = start
    S = U.new_zeros(U.shape[1], U.shape[1])
    while True:
        W = U @ S @ V.mT
        yield W, _basis(U), _basis(V)
        G = W - T
        U, S, V = U - lr * G @ V @ S.mT, S - lr * U.mT @ G @ V, V - lr * G.mT @ U @ S
        if orthonormal:  # W does not change
            (U, R_U), (V, R_V) = torch.linalg.qr(U), torch.linalg.qr(V)
            S = R_U @ S @ R_V.mT


METHODS: dict[str, Callable[[Tensor, Start, float], Iterator[Iterate]]] = {
    "geolora": geolora,
    "adaptive": lambda T, start, lr: geolora(T, start, lr, adaptive=True),
    "lora": lora,
    "simultaneous": simultaneous,
    "orthonormal": lambda T, start, lr: simultaneous(T, start, lr, orthonormal=True),
}


def _basis(factor: Tensor) -> Tensor:
    """Orthonormal basis of the range of a factor, with zero columns where it is rank-deficient."""
    P, sigma, _ = torch.linalg.svd(factor, full_matrices=False)
    return P * (sigma > 1e-12 * sigma[0].clamp_min(1e-300))


def descend(method: str, T: Tensor, start: Start, lr: float, steps: int) -> Curve:
    """Follow a descent; the curve is shorter where it diverges.

    Args:
        method: From ``METHODS``.
        T: (m, n), the target.
        start: U (m, r) and V (n, r).
        lr: Learning rate.
        steps: Number of steps.
    """
    losses, projected = [], []
    least = least_loss(T, start[0].shape[1])
    for W, U, V in islice(METHODS[method](T, start, lr), steps + 1):
        G = W - T
        loss = 0.5 * G.square().sum().item()
        if not loss < 1e6:
            break
        losses.append(max(loss - least, 0.0))
        of_V = G @ V
        projected.append(math.hypot(of_V.norm().item(), (U.mT @ G - U.mT @ of_V @ V.mT).norm().item()))
    return losses, projected


def best_rate(method: str, problems: list[tuple[Tensor, Start]], steps: int) -> float:
    """The learning rate with the smallest median of the last losses over some problems."""

    def end(lr: float) -> float:
        runs = [descend(method, T, start, lr, steps)[0] for T, start in problems]
        return median(losses[-1] if len(losses) > steps else float("inf") for losses in runs)

    return min(RATES, key=end)


def random_problem(seed: int) -> tuple[Tensor, Start]:
    """A target with the singular values of ``SPECTRUM``, and random bases of its rank to start from."""
    generator = torch.Generator().manual_seed(seed)
    P, Q, U, V = (_orthonormal(SIZE, len(SPECTRUM), generator) for _ in range(4))
    return P @ torch.diag(torch.tensor(SPECTRUM, dtype=P.dtype)) @ Q.mT, (U, V)


def saddle_problem(seed: int, off: float = 0.0, rank: int = 3) -> tuple[Tensor, Start]:
    """A target of two diagonal blocks, of which U sees one and V the other, but for a part ``off`` of each basis."""
    generator = torch.Generator().manual_seed(seed)
    half = SIZE // 2
    blocks = [
        _orthonormal(half, rank, generator)
        @ torch.diag(3.0 * 0.7 ** torch.arange(rank, dtype=torch.float64))
        @ _orthonormal(half, rank, generator).mT
        for _ in range(2)
    ]
    T = torch.block_diag(*blocks)
    U = torch.cat([torch.zeros(half, rank, dtype=T.dtype), _orthonormal(half, rank, generator)])
    V = torch.cat([_orthonormal(half, rank, generator), torch.zeros(half, rank, dtype=T.dtype)])
    if off:
        U, V = (torch.linalg.qr(B + off * _orthonormal(SIZE, rank, generator)).Q for B in (U, V))
    return T, (U, V)


def least_loss(T: Tensor, rank: int) -> float:
    """Half the energy of the singular values beyond the rank (Eckart and Young)."""
    return 0.5 * torch.linalg.svdvals(T)[rank:].square().sum().item()


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64, generator=generator)).Q


def arrival(curve: Curve, T: Tensor, start: Start) -> int | None:
    """Steps until the loss is within ``CLOSE`` of the least one, or ``None`` if it never is."""
    within = CLOSE * least_loss(T, start[0].shape[1]) + 1e-9
    return next((step for step, loss in enumerate(curve[0]) if loss <= within), None)


def from_random_starts(seeds: int, steps: int) -> dict[str, Any]:
    """Every method at its best learning rate from random starts."""
    problems = {0.0: [random_problem(seed) for seed in range(seeds)]}
    return {method: _follow(method, best_rate(method, problems[0.0][:3], steps), problems, steps) for method in METHODS}


def from_saddles(seeds: int, steps: int) -> dict[str, Any]:
    """Every method from the saddle and from starts near it, at its best learning rate near the saddle."""
    near = [saddle_problem(seed, 1e-3) for seed in range(3)]
    problems = {off: [saddle_problem(seed, off) for seed in range(seeds)] for off in OFFS}
    return {method: _follow(method, best_rate(method, near, steps), problems, steps) for method in AT_SADDLE}


def _follow(method: str, lr: float, problems: dict[float, list[tuple[Tensor, Start]]], steps: int) -> dict[str, Any]:
    curves = {off: [descend(method, *problem, lr, steps) for problem in of_off] for off, of_off in problems.items()}
    arrivals = {
        f"{off:g}": [arrival(curve, *problem) for curve, problem in zip(curves[off], of_off, strict=True)]
        for off, of_off in problems.items()
    }
    shown = sorted({round(step) for step in torch.logspace(0, math.log10(steps + 1), 80).tolist()})
    spread = {
        kind: [[float(f"{value:.3g}") for value in _range(c[i][step - 1] for c in curves[0.0])] for step in shown]
        for i, kind in enumerate(KINDS)
    }
    return {"lr": lr, "arrivals": arrivals, "steps": [step - 1 for step in shown], **spread}


def _range(values: Iterable[float]) -> tuple[float, float, float]:
    values = sorted(values)
    return values[0], median(values), values[-1]


def draw(found: dict[str, Any]) -> None:
    """Draw both figures."""
    figure, axes = figures.panels(2)
    _curves(axes, found["random"])
    figure.suptitle("a target of rank 6, from random starts")
    figures.save(figure, "matrix_approximation")

    figure, axes = figures.panels(3)
    _curves(axes, found["saddle"])
    for method, result in found["saddle"].items():
        ranges = {i: _range(steps) for i, steps in enumerate(result["arrivals"].values()) if None not in steps}
        figures.band(axes[2], list(ranges), list(ranges.values()), NAMES[method], COLORS[method])
    axes[2].set(
        xlabel="distance of the start from the saddle",
        ylabel="steps to the best approximation",
        yscale="log",
        xticks=range(len(OFFS)),
        xticklabels=[f"{off:g}" for off in OFFS],
    )
    figure.suptitle("from a point where descent on U, S and V rests though the projected gradient is not zero")
    figures.save(figure, "stationary_points")


def _curves(axes: Sequence[Axes], found: dict[str, Any]) -> None:
    for ax, kind in zip(axes, KINDS, strict=False):
        for method, result in found.items():
            ranges = [[max(value, FLOOR) for value in values] for values in result[kind]]
            figures.band(ax, [step + 1 for step in result["steps"]], ranges, NAMES[method], COLORS[method])
        ax.set(xlabel="step, from 1", ylabel=kind, xscale="log", yscale="log")
    axes[0].legend(fontsize="small")


def rows(found: dict[str, Any]) -> list[list[str]]:
    """Where every method ends, in the median: one row per method and start."""
    lines = []
    for start, of_start in found.items():
        for method, result in of_start.items():
            steps = result["arrivals"]["0"]
            arrived = [step for step in steps if step is not None]
            when = f"{median(arrived):.0f}" if len(arrived) == len(steps) else f"{len(arrived)} of {len(steps)} arrive"
            ends = [f"{result[kind][-1][1]:.1e}" for kind in KINDS]
            lines.append([NAMES[method], start, f"{result['lr']:g}", when, *ends])
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = {"random": from_random_starts(args.seeds, args.steps), "saddle": from_saddles(args.seeds, args.steps)}
    draw(found)
    Console().print(table(HEADER, rows(found)))
    command = f"python benchmarks/peers/matrix_approximation.py --seeds {args.seeds} --steps {args.steps}"
    results.write("matrix_approximation", command, found, indent=None)


if __name__ == "__main__":
    main()
