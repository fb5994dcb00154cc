"""How many threads of the CPU a retraction uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """A context in which linear algebra on the CPU uses one thread.

    The matrices of a retraction are so thin that a second thread makes QR and SVD slower, and on a busy machine threads
    wait for each other for many times as long as they compute (docs/speed.md).
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
