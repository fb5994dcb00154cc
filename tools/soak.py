"""Adapt for many steps and check that memory and orthonormality stay where they are.

    python tools/soak.py --steps 20000

Every step is an optimizer step with a retraction. The gradients come from a target that rotates, so that the bases keep
moving and ranks rise and fall. The exit status is 1 when a bound is broken.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from geolora_pl import AdapterConfig, RankAdaptiveIntegrator, RiemannianAdam, inject_adapters
from geolora_pl.math.decomposition import orthonormality_defect

MAX_BYTES_PER_STEP = 16.0  # one float per step that is kept in a list takes 32
MAX_GROWTH = 2.0  # of the defect, from the first tenth of the run to the last
WARM_UP = 0.2  # part of the steps in which allocators and caches still fill
SIZE, MAX_RANK = 32, 12
MAX_DEFECT = (
    16 * torch.finfo(torch.float32).eps * (SIZE * MAX_RANK) ** 0.5
)  # rounding, as in tests/support/tolerance.py


def resident_bytes() -> int:
    """Memory of this process in RAM, as Linux reports it."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def slope(steps: list[int], values: list[int]) -> float:
    """The least-squares slope of the values after the warm-up."""
    kept = [(s, v) for s, v in zip(steps, values, strict=True) if s >= WARM_UP * steps[-1]]
    return float(np.polyfit([s for s, _ in kept], [v for _, v in kept], 1)[0])


def soak(steps: int) -> bool:
    """Run, print the figures, and return whether all bounds hold."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Linear(SIZE, 8))
    adapters = inject_adapters(model, AdapterConfig(init_rank=4, max_rank=MAX_RANK))
    optimizer = RiemannianAdam(model, lr=0.05, weight_decay=0.01)
    integrator = RankAdaptiveIntegrator(model, tau=0.1, budget=MAX_RANK * 2 * SIZE, adapt_every=1)
    x = torch.randn(64, SIZE)
    targets = torch.randn(2, 64, 8)

    at: list[int] = []
    resident: list[int] = []
    defects: list[float] = []
    ranks: set[int] = set()
    start = time.monotonic()
    for step in range(steps + 1):
        if step % max(1, steps // 200) == 0:
            gc.collect()  # garbage that waits for its collection must not look like growth
            at.append(step)
            resident.append(resident_bytes())
            defects.append(
                max(float(orthonormality_defect(basis)) for layer in adapters.values() for basis in (layer.U, layer.V))
            )
        angle = torch.tensor(step / 50.0)
        target = angle.cos() * targets[0] + angle.sin() * targets[1]
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
        integrator.step(optimizer)
        ranks.update(integrator.ranks().values())
    seconds = time.monotonic() - start

    tenth = max(1, len(defects) // 10)
    first, middle, last = (
        max(defects[part : part + tenth]) for part in (1, len(defects) // 2, len(defects) - tenth)
    )  # the very first bases come from a QR and not from a retraction
    grown = slope(at, resident)
    print(f"{integrator.adaptations:,} adaptations in {seconds:.0f} s; ranks between {min(ranks)} and {max(ranks)}")
    print(f"memory: {resident[-1] / 2**20:.1f} MiB, {grown:+.2f} bytes per step (bound {MAX_BYTES_PER_STEP:g})")
    print(f"orthonormality defect: {first:.2e} at the start, {middle:.2e} in the middle, {last:.2e} at the end")
    print(f"  (bounds {MAX_DEFECT:g}, and {MAX_GROWTH:g} times the start)")
    return grown <= MAX_BYTES_PER_STEP and max(defects) <= MAX_DEFECT and last <= MAX_GROWTH * first


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000, help="number of steps (default 20000)")
    sys.exit(0 if soak(parser.parse_args().steps) else 1)
