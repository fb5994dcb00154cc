"""Fit the progress bar to what there is to say: numbers as short as they may be, few lines on a narrow terminal."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import ProcessingSpeedColumn
from rich import get_console
from rich.progress import BarColumn, ProgressColumn

from geolora_pl.lightning.monitor import BAR_PARAMS, BAR_RANK

_FORMATS = {BAR_RANK: "{:.1f}", BAR_PARAMS: "{:,.0f}"}
_WIDE = 120  # columns of a terminal from which on the bar itself leaves room for numbers beside it


def fit_bar(bar: ProgressBar | None) -> None:
    """Let a bar show 25,664 parameters and not 25664.000; where numbers need the room, its drawing and rate give way.

    Args:
        bar: That of the trainer, before it starts.
    """
    if bar is None:
        return
    _format_numbers(bar)
    if isinstance(bar, RichProgressBar):
        _leave_room(bar)


def _format_numbers(bar: ProgressBar) -> None:
    get_metrics = type(bar).get_metrics

    def formatted(trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics = get_metrics(bar, trainer, pl_module)
        known = {name: metrics[name] for name in _FORMATS if isinstance(metrics.get(name), (int, float))}  # no strings
        return {**metrics, **{name: _FORMATS[name].format(value) for name, value in known.items()}}

    bar.get_metrics = formatted  # type: ignore[method-assign]


def _leave_room(bar: RichProgressBar) -> None:
    configure_columns = type(bar).configure_columns

    def on_narrow_terminals(trainer: L.Trainer) -> list[ProgressColumn]:
        columns = configure_columns(bar, trainer)
        if get_console().width >= _WIDE:
            return columns
        return [column for column in columns if not isinstance(column, (BarColumn, ProcessingSpeedColumn))]

    bar.configure_columns = on_narrow_terminals  # type: ignore[method-assign]
