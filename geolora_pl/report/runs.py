"""Read the folder of a run: its metrics, from a CSV or from TensorBoard's events, its settings, its checkpoints."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from geolora_pl.errors import in_one_line
from geolora_pl.report.confusion import Confusion, read_confusion
from geolora_pl.report.metrics import ADAPTER_PARAMS, MEAN_RANK, RANK, is_rank, is_score, name_today
from geolora_pl.report.record import Record, read_record

Curve = Sequence[tuple[int, float]]
_Curves = dict[str, list[tuple[int, float]]]
_MARK = MEAN_RANK  # of a fit: it is logged from the start on, and no evaluation logs it
_MOST_SETTINGS = 100_000
_LARGEST = 2**62  # of a step and of a value: what is above has left every picture, and its sums overflow


@dataclass(frozen=True)
class Run:
    """What a run left behind.

    Attributes:
        name: The name of the folder, with as much of its path as tells it from the other runs.
        folder: The folder of the run.
        curves: Steps, ascending, and values by the name of the metric.
        settings: The settings in ``config.yaml`` by their dotted names.
        checkpoints: Its checkpoint files, the last one at the end.
        record: What it wrote of itself, such as its model and when it began.
        confusion: How often each class was taken for which, in its last validation.
    """

    name: str
    folder: Path
    curves: Mapping[str, Curve]
    settings: Mapping[str, object]
    checkpoints: Sequence[Path]
    record: Record
    confusion: Confusion | None

    @property
    def ranks(self) -> dict[str, Curve]:
        """The rank of each adapter over steps."""
        return {name.removeprefix(RANK): curve for name, curve in self.curves.items() if is_rank(name)}

    @property
    def scores(self) -> dict[str, Curve]:
        """The metrics of the module: losses, scores, and whatever else it logs."""
        return {name: curve for name, curve in self.curves.items() if is_score(name)}


def read_runs(folders: str | Path | Sequence[str | Path]) -> list[Run]:
    """Read the folders of runs.

    Args:
        folders: Folders that loggers wrote to, such as ``lightning_logs/version_0``; one or several.

    Raises:
        ValueError: No run is named, one of them is not a folder of a run, or one is named twice.
    """
    paths = [Path(folder) for folder in ([folders] if isinstance(folders, (str, Path)) else folders)]
    if not paths:
        raise ValueError("runs=[] names no run: name the folder of one at least")
    names = _distinct_names(paths)
    return [read_run(path, name) for path, name in zip(paths, names, strict=True)]


def read_run(folder: Path, name: str | None = None) -> Run:
    """Read the folder of one run.

    Of several runs in the same folder it is the last, with what it did before it was resumed, and the metrics of
    evaluations afterwards.

    Raises:
        ValueError: It is not a folder, holds no metrics, or a file in it cannot be read.
    """
    try:
        return _read_run(folder, name)
    except OSError as error:
        raise ValueError(
            f"run='{folder}' cannot be read ({error.filename}: {error.strerror}): correct that, or name another folder"
        ) from error


def _read_run(folder: Path, name: str | None) -> Run:
    if not folder.is_dir():
        raise ValueError(f"run='{folder}' is not a folder (from {Path.cwd()}): name the one that the logger wrote to")
    tables = sorted(_files(folder, "metrics.*.csv"), key=_number) + _files(folder, "metrics.csv")
    events = sorted(_files(folder, "events.out.tfevents.*"))
    if not tables and not events:
        below = (path for pattern in ("*/*", "*/*/*") for path in folder.glob(pattern) if _is_log(path))
        inside = sorted(path.parent.relative_to(folder).as_posix() for path in below)
        hint = f"its folder {inside[-1]!r} does" if inside else "train with the logger of CSV or TensorBoard"
        raise ValueError(f"run='{folder}' holds neither metrics.csv nor TensorBoard's events: {hint}")
    curves: _Curves = {}
    for points in map(_of_table, tables) if tables else map(_of_events, events):
        part: _Curves = {}
        _add(part, points)
        if _MARK not in part:
            part = {name_today(metric): curve for metric, curve in part.items()}
        if _MARK not in part and _MARK in curves:  # an evaluation, whose steps say nothing of the run
            curves |= {metric: curve for metric, curve in part.items() if metric not in curves}
        elif _MARK in part and part[_MARK][0][0] == 0:  # another run
            curves = part
        else:
            _add(curves, ((metric, step, value) for metric, curve in part.items() for step, value in curve))
    if not curves:
        raise ValueError(f"run='{folder}' holds no number: its log is empty or broken, so name another folder")
    checkpoints = _files(folder, "checkpoints/*.ckpt")  # sharded ones are folders
    checkpoints.sort(key=lambda path: (path.name.startswith("last"), path.stat().st_mtime))
    settings, record, confusion = _settings(folder / "config.yaml"), read_record(folder), read_confusion(folder)
    return Run(name or folder.resolve().name, folder, curves, settings, checkpoints, record, confusion)


def _files(folder: Path, pattern: str) -> list[Path]:
    """The files of that name; a pipe, for which one would wait, is not a file."""
    return [path for path in folder.glob(pattern) if path.is_file()]


def _is_log(path: Path) -> bool:
    return path.name == "metrics.csv" or path.name.startswith("events.out.tfevents.")


def _number(path: Path) -> int:
    number = path.name.split(".")[1]
    return int(number) if number.isdecimal() else 0


def _add(curves: _Curves, points: Iterable[tuple[str, int, float]]) -> None:
    """Add points to curves; of two at the same step the later counts."""
    for metric, step, value in points:
        curve = curves.setdefault(metric, [])
        while curve and curve[-1][0] >= step and not (len(curve) == 1 and step == 0 and _has_start(metric)):
            curve.pop()
        curve.append((step, value))


def _has_start(metric: str) -> bool:
    """Whether it is logged before the first batch as well, which has the step 0 too."""
    return name_today(metric) in (ADAPTER_PARAMS, MEAN_RANK) or is_rank(metric)


def _of_table(path: Path) -> Iterable[tuple[str, int, float]]:
    try:
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # a process that was killed leaves half a line
        for row in csv.DictReader(io.StringIO(whole)):
            step = int(row.pop("step"))
            if abs(step) >= _LARGEST:
                raise ValueError(f"step {step}")
            values = {name: float(cell) for name, cell in row.items() if cell}
            yield from ((n, step, min(max(v, -_LARGEST), _LARGEST)) for n, v in values.items() if math.isfinite(v))
    except (csv.Error, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a table of metrics of Lightning ({error})") from error


def _of_events(path: Path) -> Iterable[tuple[str, int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # a second of imports

    log = EventAccumulator(str(path), size_guidance={"scalars": 0, "images": 1, "histograms": 1})
    log.Reload()
    for name in log.Tags()["scalars"]:
        for event in log.Scalars(name):
            if math.isfinite(event.value):
                yield name, event.step, event.value


def _settings(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        _check_size(settings)
        return dict(_flat(settings))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {in_one_line(error)}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not a configuration of a run: {error}") from error


def _check_size(settings: Any) -> None:
    """Refuse settings without an end, which a few lines of YAML make by naming a list in a list again and again."""
    waiting, left = [settings], _MOST_SETTINGS
    while waiting:
        value = waiting.pop()
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        left -= 1
        if left < len(waiting):
            raise ValueError(f"it has more than {_MOST_SETTINGS} settings")


def _flat(settings: Any, name: str = "") -> Iterable[tuple[str, object]]:
    if isinstance(settings, dict) and settings:
        for key, value in settings.items():
            yield from _flat(value, f"{name}.{key}" if name else str(key))
    elif isinstance(settings, list) and any(isinstance(entry, dict) for entry in settings):
        for i, value in enumerate(settings):
            yield from _flat(value, f"{name}.{i}")
    else:
        yield name, settings


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    whole = [path.resolve() for path in paths]
    if len(set(whole)) < len(whole):
        twice = next(path for path in paths if whole.count(path.resolve()) > 1)
        raise ValueError(f"run='{twice}' is given twice: name each run once")
    length = 1
    while len({path.parts[-length:] for path in whole}) < len(whole):
        length += 1
    return [str(Path(*path.parts[-length:])) for path in whole]
