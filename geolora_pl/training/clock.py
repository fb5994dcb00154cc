"""Time on the device, measured without waiting for it."""

from __future__ import annotations

import time
from typing import Any

import torch


class DeviceClock:
    """Seconds that a device works on something, told without waiting for it.

    On a GPU the host runs ahead, and what it waits for in between is earlier work: there events in the device's own
    queue are compared, and read later.

    Attributes:
        count: How often something was counted.

    Args:
        device: Of the work.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.count = 0
        self._total = 0.0
        self._last: float | None = None
        self._pending: list[tuple[Any, Any]] = []

    def now(self) -> Any:
        """A mark to be given to :meth:`add`."""
        if self.device.type != "cuda":
            return time.perf_counter()
        with torch.cuda.device(self.device):
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return event

    def add(self, start: Any) -> None:
        """Count what was done since ``start``."""
        self.count += 1
        if self.device.type == "cuda":
            self._pending.append((start, self.now()))
        else:
            self._last = float(time.perf_counter() - start)
            self._total += self._last

    def last(self) -> float | None:
        """Seconds of what was counted last, if anything was; waits for it."""
        for start, end in self._pending:
            end.synchronize()
            self._last = float(start.elapsed_time(end)) / 1000
            self._total += self._last
        self._pending.clear()
        return self._last

    def total(self) -> float:
        """Seconds in all; waits for the last."""
        self.last()
        return self._total
