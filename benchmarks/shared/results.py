"""Results as a file: what was found, by which command, on which machine and with which versions."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from typing import Any

import torch

from benchmarks.shared.paths import RESULTS

VERSIONS = ("torch", "timm", "transformers", "peft", "lightning")

Record = dict[str, Any]  # what one measurement found, as it stands in a file of results


def machine() -> Record:
    """The machine that a benchmark runs on, and the versions it runs with."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {name: metadata.version(name) for name in VERSIONS},
    }


def read(name: str) -> Any:
    """The results in ``benchmarks/results/NAME.json``."""
    return json.loads((RESULTS / f"{name}.json").read_text())["results"]


def write(name: str, command: str, results: object, indent: int | None = 1) -> None:
    """Write ``benchmarks/results/NAME.json``.

    Args:
        name: Name of the file.
        command: The command that made the results.
        results: What was found, as plain values.
        indent: Spaces per level, or ``None`` for a file of one line.
    """
    content = {"command": command, "machine": machine(), "results": results}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=indent) + "\n")
