"""Tell the step of an optimizer from the step of its base class inside of it."""

from __future__ import annotations

from inspect import currentframe

from torch.optim import Optimizer


class Nesting:
    """Follows calls of ``step``, for torch calls its hooks in every ``super().step()`` of a subclass once more.

    A call that an exception has ended is never left. It is forgotten when another starts that cannot lie inside of it,
    because it is called from a place no deeper.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[int, int]] = []  # the optimizer and depth of each call, outermost first

    @property
    def inner(self) -> bool:
        """Whether the innermost call that goes on is inside of another."""
        return len(self._calls) > 1

    def enter(self, optimizer: Optimizer) -> None:
        """Follow a call of ``step`` that starts."""
        depth, frame = 0, currentframe()
        while frame is not None:
            depth, frame = depth + 1, frame.f_back
        while self._calls and (self._calls[-1][0] != id(optimizer) or self._calls[-1][1] >= depth):
            self._calls.pop()
        self._calls.append((id(optimizer), depth))

    def leave(self, optimizer: Optimizer) -> None:
        """Forget a call of ``step`` that ends."""
        if self._calls and self._calls[-1][0] == id(optimizer):
            self._calls.pop()
