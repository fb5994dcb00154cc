"""Fit the progress bar to what there is to say: whole numbers of parameters, and few lines on a narrow terminal."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from rich import get_console
from rich.progress import BarColumn, ProgressColumn

from geolora_pl.lightning.monitor import IN_BAR
from geolora_pl.report.metrics import ADAPTER_PARAMS

_WIDE = 120  # columns of a terminal from which on the bar itself leaves room for numbers beside it


def fit_bar(bar: ProgressBar | None) -> None:
    """Let a bar show 25,664 parameters and not 25664.000, and leave its drawing out where numbers need the room.

    Args:
        bar: That of the trainer, before it starts.
    """
    if bar is None:
        return
    _show_whole_numbers(bar)
    if isinstance(bar, RichProgressBar):
        _leave_room(bar)


def _show_whole_numbers(bar: ProgressBar) -> None:
    get_metrics = type(bar).get_metrics
    whole = next(short for short, name in IN_BAR.items() if name == ADAPTER_PARAMS)

    def with_whole_numbers(trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics = get_metrics(bar, trainer, pl_module)
        value = metrics.get(whole)
        return {**metrics, whole: f"{value:,.0f}"} if isinstance(value, (int, float)) else metrics  # no strings

    bar.get_metrics = with_whole_numbers  # type: ignore[method-assign]


def _leave_room(bar: RichProgressBar) -> None:
    configure_columns = type(bar).configure_columns

    def on_narrow_terminals(trainer: L.Trainer) -> list[ProgressColumn]:
        columns = configure_columns(bar, trainer)
        if get_console().width >= _WIDE:
            return columns
        return [column for column in columns if not isinstance(column, BarColumn)]

    bar.configure_columns = on_narrow_terminals  # type: ignore[method-assign]
