"""Finish what must not stay half done, even if the user presses Ctrl-C in the middle of it."""

from __future__ import annotations

from collections.abc import Callable


def finish(write: Callable[[], None]) -> None:
    """Call a function until it has reached its end, and only then let an interrupt through.

    An interrupt (Ctrl-C, or another exception that is no ``Exception``) stops Python between any two operations. No
    signal handler is replaced for this, and nothing is slower.

    Args:
        write: May be called again after it was stopped anywhere, as when it only copies what was prepared before.

    Raises:
        BaseException: The last interrupt, after the end; or at once an ``Exception`` of the function.
    """
    interrupt: BaseException | None = None
    done = False
    while not done:
        try:
            write()
            done = True
        except Exception:
            raise
        except BaseException as stopped:
            interrupt = stopped
    if interrupt is not None:
        raise interrupt
