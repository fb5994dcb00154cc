"""Time on the device, measured without waiting for it."""

from __future__ import annotations

import time
from typing import Any

import torch


class DeviceClock:
    """Measures how many seconds a device works on something, without waiting for it.

    The host runs ahead of a GPU, so that its own clock would measure earlier work. Events in the queue of the GPU are
    recorded instead, and read later.

    Attributes:
        count: How many times :meth:`add` was called.

    Args:
        device: The device that works.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.count = 0
        self._total = 0.0
        self._last: float | None = None
        self._pending: list[tuple[Any, Any]] = []

    def now(self) -> Any:
        """Return a mark of the present time, for :meth:`add`."""
        if self.device.type != "cuda":
            return time.perf_counter()
        with torch.cuda.device(self.device):
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return event

    def add(self, start: Any) -> None:
        """Add the time since the mark ``start``."""
        self.count += 1
        if self.device.type == "cuda":
            self._pending.append((start, self.now()))
        else:
            self._last = float(time.perf_counter() - start)
            self._total += self._last

    def last(self) -> float | None:
        """Return the seconds that were added last, or ``None`` if none were; waits for the device."""
        for start, end in self._pending:
            end.synchronize()
            self._last = float(start.elapsed_time(end)) / 1000
            self._total += self._last
        self._pending.clear()
        return self._last

    def total(self) -> float:
        """Return the sum of all seconds; waits for the device."""
        self.last()
        return self._total
