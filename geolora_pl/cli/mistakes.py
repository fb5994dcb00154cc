"""What a user sees of a mistake: one line, and the traceback on request."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from geolora_pl.report.printable import printable

_TRACEBACK = "GEOLORA_TRACEBACK"  # the variable of the environment that asks for tracebacks
_FIXABLE = (ValueError, OSError, FloatingPointError)  # a setting, a file or the network, values; the rest are defects

_OF_A_LOADER = re.compile(r"Caught \w+ in DataLoader worker process \d+\.\n")  # how torch begins what it passes on


@contextmanager
def one_line(hint: str = "") -> Iterator[None]:
    """End the process with one line and status 1 where something is wrong that a user can fix.

    ``GEOLORA_TRACEBACK=1`` shows where it arose; other errors are shown so in any case.

    Args:
        hint: A further line.
    """
    try:
        yield
    except Exception as error:
        # The error of Lightning is told by its name, because to import Lightning takes seconds.
        fixable = isinstance(error, _FIXABLE) or type(error).__name__ == "MisconfigurationException"
        if not fixable or os.environ.get(_TRACEBACK, "0") != "0":
            raise
        said = printable(" ".join(_words(error).split())) or type(error).__name__
        print("\n".join(filter(None, (f"error: {said}", hint))), file=sys.stderr)
        raise SystemExit(1) from error


def _words(error: Exception) -> str:
    """What an error says; one that a process of a loader has found says its traceback first."""
    said = str(error)
    if not _OF_A_LOADER.match(said):
        return said
    return re.split(rf"^[\w.]*{type(error).__name__}: ", said, flags=re.M)[-1]
