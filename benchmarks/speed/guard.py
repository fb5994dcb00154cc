"""Tells whether a step has become slower than the committed measurement, by more than both of them spread."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.shared.results import RESULTS
from benchmarks.speed import random_models, timing
from benchmarks.speed.random_models import Setup

NAME = "throughput_guard"
SETUP = Setup("bert", batch_size=8, length=64, sizes=(256, 2, 4))
METHODS = ("defaults", "lora", "bound")
OVER = {"bound": "frozen", "lora": "LoRA"}

Ratios = Mapping[str, Sequence[float]]  # lower quartile, median and upper quartile of the ratio to a method


def measure(rounds: int) -> dict[str, list[float]]:
    """The quartiles of a step's ratios on one thread."""
    methods = {name: timing.compared_at(SETUP.rank)[name] for name in METHODS}
    times = timing.measure(SETUP, random_models.load(SETUP), methods, rounds)
    over = timing.summary(times, SETUP.amount)["defaults"]["over"]
    return {base: over[base] for base in OVER}


def committed() -> dict[str, Any] | None:
    """The committed ratios; ``None`` before the first."""
    path = RESULTS / f"{NAME}.json"
    return json.loads(path.read_text())["results"] if path.exists() else None


def is_slower(now: Sequence[float], before: Sequence[float]) -> bool:
    """Whether the quartiles do not overlap, and the medians are further apart than the wider of the two spreads."""
    spread = max(now[2] - now[0], before[2] - before[0])
    return now[0] > before[2] and now[1] - before[1] > spread


def rows(now: Ratios, before: Ratios) -> list[list[str]]:
    """A row per ratio: what was found, what is committed, and the verdict."""

    def shown(quartiles: Sequence[float]) -> str:
        low, middle, high = quartiles
        return f"{middle:.3f} ({low:.3f} to {high:.3f})"

    verdicts = {base: "slower" if is_slower(now[base], before[base]) else "as before" for base in OVER}
    return [[f"over {name}", shown(now[base]), shown(before[base]), verdicts[base]] for base, name in OVER.items()]
