"""What of a run may be shown to everybody: numbers and known words, and no path, text or name of the user's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from geolora_pl.report.runs import Run
from geolora_pl.storage.hub import is_hub_name

# By their names, of which the last part is an argument of a class and never a key that the user has chosen.
_SHOWN = re.compile(
    r"seed_everything|trainer\.(max_epochs|max_steps|precision|accumulate_grad_batches|gradient_clip_val)"
    r"|geolora\.(adapter\.)?\w+|(model|data)\.(class_path|init_args\.\w+)"
    r"|model\.init_args\.(adapter|model_args|(optimizer|lr_scheduler)(\.init_args)?)\.\w+"
)
# Settings whose texts are words of a library or names of layers; a text of any other may be the user's own, and so may
# every text of a class that is not known to everybody.
_WORDS = re.compile(
    r".*\b(class_path|precision|geometry|on_nonfinite|on_divergence|target_modules|exclude_modules|modules_to_save|task)"
)
_WORD = re.compile(r"[\w.*|()\\+-]{1,200}")
_KNOWN = ("geolora_pl.", "torch.", "lightning.")  # packages whose classes are known to everybody
_MOST = 80
_EVALUATED = re.compile(r"(val|valid|validation|test)[_/](.+)")


class Score(NamedTuple):
    """A metric that a run has logged of its evaluations."""

    name: str
    split: str
    metric: str
    value: float
    step: int


@dataclass(frozen=True)
class DataSource:
    """What a run was trained on.

    Attributes:
        name: The class of the data source, with its task.
        hub_name: Its name on the hub, if it may have one.
    """

    name: str
    hub_name: str | None = None


def public_settings(settings: Mapping[str, object]) -> dict[str, str]:
    """The settings of a run that say how it was trained, as texts.

    Numbers are shown, and texts where they are words of a library or names of layers. Everything else is left out:
    paths, column names, tokens, and classes that are not public with all their texts.

    Args:
        settings: By their dotted names, as in :class:`Run`.

    Example:
        >>> public_settings({"geolora.tau": 0.3, "data.init_args.folder": "/home/me", "data.class_path": "mine.Data"})
        {'geolora.tau': '0.3'}
    """
    shown = {
        name: _text(name, value, _is_of_known(name, settings))
        for name, value in settings.items()
        if _SHOWN.fullmatch(name)
    }
    return dict([(name, text) for name, text in shown.items() if text][:_MOST])


def scores_of(run: Run, step: int | None) -> list[Score]:
    """The metrics of evaluations that belong to a step.

    Args:
        run: The run.
        step: The number of optimizer steps of the checkpoint; the last validation until then counts, and a test at that
            step alone. ``None`` for the last values.
    """
    found = []
    for name, curve in sorted(run.scores.items()):
        parts = _EVALUATED.fullmatch(name)
        if parts is None:
            continue
        split = "test" if parts[1] == "test" else "validation"
        if step is not None:
            # Loggers count steps from 0: the last one is step - 1. A test after the fit has the step that never came.
            steps = range(step - 1, step + 1) if split == "test" else range(step)
            curve = [point for point in curve if point[0] in steps]
        if curve:
            at, value = curve[-1]
            found.append(Score(name, split, parts[2], value, at))
    return found


def data_of(settings: Mapping[str, object]) -> DataSource | None:
    """The data source of a run, if it is one of this package."""
    path = str(settings.get("data.class_path"))
    if not path.startswith("geolora_pl."):
        return None
    name, task = path.rpartition(".")[2], settings.get("data.init_args.task")
    hub_name = settings.get("data.init_args.dataset")
    return DataSource(
        f"{name} {task}" if isinstance(task, str) and _WORD.fullmatch(task) else name,
        hub_name if isinstance(hub_name, str) and may_be_on_hub(hub_name) else None,
    )


def may_be_on_hub(name: str) -> bool:
    """Whether a name may be that of a model or data set on the hub: it looks like one, and is no path from here."""
    return is_hub_name(name) and not Path(name).exists()


def _is_of_known(name: str, settings: Mapping[str, object]) -> bool:
    """Whether a setting is an argument of a class that is known to everybody, or of no class."""
    owner, is_argument, _ = name.rpartition(".init_args.")
    return not is_argument or str(settings.get(f"{owner}.class_path")).startswith(_KNOWN)


def _text(name: str, value: object, is_of_known: bool) -> str:
    """A value as text, empty where it is not to be shown."""
    if isinstance(value, list):
        texts = [_text(name, entry, is_of_known) for entry in value]
        return ", ".join(texts) if all(texts) else ""
    if isinstance(value, (bool, int, float)):
        return str(value)
    if not is_of_known or not isinstance(value, str) or not _WORDS.fullmatch(name) or not _WORD.fullmatch(value):
        return ""
    if name.endswith("class_path"):
        return value.rpartition(".")[2] if value.startswith(_KNOWN) else ""
    return value
