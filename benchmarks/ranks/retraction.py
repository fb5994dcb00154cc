"""Two retractions of a real run, and what tau keeps: the figure of ``docs/method.md``.

    python benchmarks/ranks/retraction.py

The quickstart's ViT learns the digits with this package's defaults. Just before two retractions, an early and a later
one, the singular values of every update are taken: those of U S V^T alone, and those with the pending steps in K and L.
It takes half a minute on one core and writes ``docs/figures/retraction.svg``.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is found from where this script lies

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from benchmarks.shared import figures, tasks
from benchmarks.shared.methods import GeoLoRA, default_lr, defaults
from benchmarks.shared.task import Task
from geolora_pl import GeoLoRACallback, GeoLoRALayer
from geolora_pl.adapters.inject import find_adapters

EARLY, LATER = 16, 66  # the steps after which the two retractions come
SHOWN = "model.blocks.1.attn.qkv"
SEEN = 1e-6  # smaller singular values, relative to the largest, are rounding errors


@dataclass(frozen=True)
class Retraction:
    """One retraction of one adapter.

    Attributes:
        before: Singular values of ``U S V^T``, as the last retraction left it; none before the first one.
        pending: Singular values of ``U S V^T + K V^T + U L^T``.
        old_rank: Rank before the retraction.
        kept: How many of ``pending`` the retraction has kept: those that tau keeps, and those that still grow.
        rank: Rank after the retraction, with the directions that probes have found.
        size: Parameters per rank.
        max_rank: Largest possible rank.
    """

    before: Tensor
    pending: Tensor
    old_rank: int
    kept: int
    rank: int
    size: int
    max_rank: int


def kept_rank(sigma: Tensor, tau: float, max_rank: int) -> int:
    """The smallest rank that drops no more than the part tau of the norm."""
    tails = sigma.square().flip(0).cumsum(0).flip(0)
    return min(int((tails > tau**2 * tails[0]).sum()), max_rank)


def observe(task: Task, steps: Sequence[int], seed: int = 0) -> dict[int, dict[str, Retraction]]:
    """Train, and record every adapter before and after the retractions at the given steps."""
    model = task.make_model(seed)
    training = GeoLoRA().start(task, model, default_lr())
    adapters = find_adapters(model)
    found: dict[int, dict[str, Retraction]] = {}
    for step, batch in enumerate(islice(task.batches(seed), max(steps)), start=1):
        training.optimizer.zero_grad()
        training.model(**batch).loss.backward()
        training.optimizer.step()
        looked = {name: _look(layer) for name, layer in adapters.items()} if step in steps else {}
        training.after_step(step - 1)
        if looked:
            found[step] = {name: Retraction(*looked[name], *_sizes(layer)) for name, layer in adapters.items()}
    return found


def _look(layer: GeoLoRALayer) -> tuple[Tensor, Tensor, int]:
    return _singular_values(layer.S), _singular_values(layer.delta_weight()), layer.rank


def _sizes(layer: GeoLoRALayer) -> tuple[int, int, int, int]:
    return int(layer.S.any(0).sum()), layer.rank, layer.in_features + layer.out_features, layer.max_rank


def _singular_values(matrix: Tensor) -> Tensor:
    sigma = torch.linalg.svdvals(matrix.detach().double())
    return sigma[sigma > SEEN * sigma[:1]]


def parameters(found: Sequence[Retraction], tau: float) -> int:
    """The number of adapter parameters that a truncation by tau would keep in all layers."""
    return sum(of_layer.size * kept_rank(of_layer.pending, tau, of_layer.max_rank) for of_layer in found)


def draw(found: dict[int, dict[str, Retraction]]) -> None:
    """Draw the singular values of one adapter at both retractions, and the parameters that other values of tau keep."""
    figure, axes = figures.panels(3)
    for ax, (step, of_step) in zip(axes, found.items(), strict=False):
        one = of_step[SHOWN]
        ax.plot(range(1, len(one.pending) + 1), one.pending, "o", color="C0", label="with the steps since")
        if len(one.before):
            ax.plot(range(1, len(one.before) + 1), one.before, "_", color="C1", markersize=12, label="a retraction ago")
        ax.axvspan(one.kept + 0.5, len(one.pending) + 0.5, color="0.92", linewidth=0)
        ax.annotate("dropped", (0.98, 0.98), xycoords="axes fraction", ha="right", va="top", color="0.4")
        title = f"{SHOWN.removeprefix('model.')}, step {step}: rank {one.old_rank} to {one.rank}"
        ax.set(yscale="log", ylim=(1e-4, 3), xlabel="singular value", title=title)
        ax.legend(fontsize="small", loc="lower left")
    default = defaults(GeoLoRACallback)["tau"]
    taus = [i / 100 for i in range(1, 61)]
    for step, of_step in found.items():
        sizes = [parameters(list(of_step.values()), tau) for tau in taus]
        axes[2].plot(taus, sizes, label=f"step {step}")
    axes[2].axvline(default, color="0.7", linewidth=1)
    axes[2].annotate("default", (default, 0), (4, 4), textcoords="offset points", color="0.4")
    axes[2].set(xlabel="tau", title="adapter parameters kept, all layers", ylim=(0, None))
    axes[2].legend(fontsize="small")
    figures.save(figure, "retraction")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    draw(observe(tasks.load("digits"), (EARLY, LATER)))


if __name__ == "__main__":
    main()
