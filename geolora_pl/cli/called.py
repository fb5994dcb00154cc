"""What the user called, for help and hints that can be run as they stand."""

from __future__ import annotations

import sys
from pathlib import Path

SCRIPT = "geolora-pl"  # what an installation puts on the path, by pyproject.toml


def called() -> str:
    """The command line in the words of the user: ``geolora-pl``, or else ``python -m geolora_pl``."""
    return SCRIPT if Path(sys.argv[0]).stem == SCRIPT else "python -m geolora_pl"
