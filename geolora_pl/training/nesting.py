"""Tell the step of an optimizer from the step of its base class inside of it."""

from __future__ import annotations

from inspect import currentframe
from types import FrameType
from typing import Any

from torch.optim import Optimizer


class Nesting:
    """Follows calls of ``step``, for torch calls its hooks in every ``super().step()`` of a subclass once more.

    A call that an exception has ended is never left. It is forgotten when another starts that does not lie inside of
    it, because its frame is not on the stack any more.
    """

    def __init__(self) -> None:
        # The optimizer of each call and the frame in which torch calls the hooks, outermost first.
        self._calls: list[tuple[Optimizer, FrameType | None]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"_calls": []}  # a copy is in no call, and frames cannot be copied

    @property
    def inner(self) -> bool:
        """Whether the innermost call that goes on is inside of another."""
        return len(self._calls) > 1

    def enter(self, optimizer: Optimizer) -> None:
        """Follow a call of ``step`` that starts."""
        stack, frame = [], currentframe()
        while frame is not None:
            stack.append(frame)
            frame = frame.f_back
        while self._calls and (self._calls[-1][0] is not optimizer or self._calls[-1][1] not in stack):
            self._calls.pop()
        of_torch = (frame for frame in stack if frame.f_globals.get("__name__") == Optimizer.__module__)
        self._calls.append((optimizer, next(of_torch, None)))

    def leave(self, optimizer: Optimizer) -> bool:
        """Forget a call of ``step`` that ends; whether it was the outermost."""
        if not self._calls or self._calls[-1][0] is not optimizer:
            return False
        self._calls.pop()
        return not self._calls
