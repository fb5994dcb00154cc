"""The command init, which writes a configuration to start from, and where that of the quickstart lies."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

import geolora_pl
from geolora_pl.cli.called import called
from geolora_pl.cli.mistakes import one_line

_CONFIGS = Path(geolora_pl.__file__).parent / "configs"
QUICKSTART = _CONFIGS / "quickstart.yaml"
STARTS = {path.stem: path for path in sorted((_CONFIGS / "init").glob("*.yaml"))}  # a task for every file there


def main(args: Sequence[str]) -> None:
    """Run ``init``.

    Args:
        args: The command and its arguments.
    """
    given = parser().parse_args(args[1:])
    with one_line():
        output = write_start(given.task, given.output)
    print(f"{output} is written: see the comments in it, then run {called()} fit --config {shlex.quote(str(output))}")


def write_start(task: str, output: str | None = None) -> Path:
    """Write the configuration to start from of a task.

    Args:
        task: One of ``STARTS``.
        output: The file to write; by default the name of the task with ``.yaml``, in the working folder.

    Returns:
        The file that was written.

    Raises:
        ValueError: There is such a file already, or no folder for it.
    """
    target = Path(output or f"{task}.yaml")
    try:
        with target.open("x", encoding="utf-8") as file:  # fails where a file is, also one that comes in between
            file.write(STARTS[task].read_text(encoding="utf-8"))
    except FileExistsError as error:
        raise ValueError(
            f"output={str(target)!r} is there already, and is kept: name another file as --output"
        ) from error
    except OSError as error:
        raise ValueError(f"output={str(target)!r} cannot be written: {error.strerror}") from error
    return target


def parser() -> argparse.ArgumentParser:
    """The parser of ``init``."""
    said = "Write a commented configuration to start from; no file is ever replaced."
    made = argparse.ArgumentParser(f"{called()} init", allow_abbrev=False, description=said)
    made.add_argument("task", choices=list(STARTS), help="What is to be trained.")
    made.add_argument("--output", metavar="FILE", help="By default the name of the task with .yaml, in this folder.")
    return made
