"""Peak memory of training by each method, on a CPU in a process of its own."""

from __future__ import annotations

import gc
import re
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

import torch

from benchmarks.shared.methods import Method
from benchmarks.shared.task import to_device
from benchmarks.speed import random_models, timing
from benchmarks.speed.random_models import Setup

STEPS = 12  # enough for one adaptation at the default cadence
REPEATS = 2  # processes per method, since the system hands out pages a little differently in each


def peaks(setup: Setup, methods: Mapping[str, Method]) -> dict[str, float]:
    """Peak megabytes of a few steps of each method, beyond what the process held before it had a model."""
    if setup.device == "cuda":  # of which torch counts every byte
        return {name: round(peak(setup, method, name) / 1e6, 1) for name, method in methods.items()}
    found = {}
    for name, method in methods.items():
        values = []
        for _ in range(REPEATS):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
                values.append(fresh.submit(peak, setup, method, name).result())
        found[name] = round(mean(values) / 1e6, 1)
    return found


def peak(setup: Setup, method: Method, name: str) -> float:
    """Peak bytes of a few steps in this process, beyond what it holds already.

    On a CPU this is the largest resident set of this process alone; ``getrusage`` would begin with that of the process
    that started it.
    """
    torch.set_num_threads(setup.threads)
    task = random_models.load(setup)
    batches = task.batches(0)
    gc.collect()
    before = torch.cuda.memory_allocated() if setup.device == "cuda" else _status("VmRSS")
    if setup.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    training = timing.start(setup, task, method, name)
    for number in range(STEPS):
        timing.step(setup, training, to_device(next(batches), setup.device), task.steps // 2 + number)
    return (torch.cuda.max_memory_allocated() if setup.device == "cuda" else _status("VmHWM")) - before


def _status(key: str) -> int:
    """Bytes of this process from Linux's table of its status."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None, key
    return 1024 * int(found[1])
