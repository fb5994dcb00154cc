"""The tasks by name."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from benchmarks.shared import image_tasks, text_tasks
from benchmarks.shared.paths import GLUE_FOLDER
from benchmarks.shared.task import Task

IMAGE_TASKS = ("digits", "held_out", "rotated")
TEXT_TASKS = tuple(text_tasks.SETTINGS)


@cache
def load(name: str, glue: Path = GLUE_FOLDER) -> Task:
    """The task of a name.

    Args:
        name: From ``IMAGE_TASKS`` or ``TEXT_TASKS``.
        glue: Folder of GLUE in the official layout.
    """
    return image_tasks.load(name) if name in IMAGE_TASKS else text_tasks.load(name, glue)
