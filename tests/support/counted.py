"""Count what Python does in a call, for tests of how work grows: a count is the same on every machine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def operations(work: Callable[[], Any]) -> int:
    """The calls of functions, of Python and of C, that a piece of work makes."""
    count, before = 0, sys.getprofile()

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count
