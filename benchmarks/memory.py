"""Peak memory of a training, each in a process of its own."""

from __future__ import annotations

import gc
import re
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

import random_models
import timing
import torch
from methods import Method
from random_models import Setup
from tasks import on

STEPS = 12  # an adaptation at the default cadence among them
REPEATS = 2  # processes: pages are handed out a little differently in each


def peaks(setup: Setup, methods: Mapping[str, Method]) -> dict[str, float]:
    """Megabytes at the peak of a few steps of each method, over what the process held before it had a model."""
    found = {}
    for name, method in methods.items():
        values = []
        for _ in range(1 if setup.device == "cuda" else REPEATS):  # torch counts to the byte on a GPU
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
                values.append(fresh.submit(peak, setup, method, name).result())
        found[name] = round(mean(values) / 1e6, 1)
    return found


def peak(setup: Setup, method: Method, name: str) -> float:
    """Bytes, in this process.

    On a CPU this is the largest resident set: of this process alone, where ``getrusage`` would begin with that of the
    process which started it.
    """
    torch.set_num_threads(setup.threads)
    task = random_models.load(setup)
    batches = task.batches(0)
    gc.collect()
    before = 0 if setup.device == "cuda" else _status("VmRSS")
    training = timing.start(setup, task, method, name)
    for number in range(STEPS):
        timing.step(setup, training, on(setup.device, next(batches)), task.steps // 2 + number)
    return torch.cuda.max_memory_allocated() if setup.device == "cuda" else _status("VmHWM") - before


def _status(key: str) -> int:
    """Bytes of this process, as Linux tells them."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None, key
    return 1024 * int(found[1])
