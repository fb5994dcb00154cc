"""What a fit prints: a table of what is adapted before it, a table of the ranks found after it."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary
from rich.table import Table
from rich.text import Text
from torch import nn

from geolora_pl.adapters.base import FACTORS
from geolora_pl.adapters.counts import Counts
from geolora_pl.adapters.inject import adapter_parameters
from geolora_pl.lightning.internals import callbacks_of
from geolora_pl.lightning.monitor import RankMonitor
from geolora_pl.report.identity import in_words
from geolora_pl.report.metrics import is_score
from geolora_pl.report.printed import depth_table, layers_title
from geolora_pl.storage.fingerprint import base_parameters


def wants_tables(trainer: L.Trainer) -> bool:
    """Whether this process prints, which Lightning's ``enable_model_summary=False`` forbids."""
    return trainer.is_global_zero and any(isinstance(callback, ModelSummary) for callback in callbacks_of(trainer))


def start_summary(model: nn.Module, monitor: RankMonitor) -> tuple[Table, list[str]]:
    """What is adapted, which parameters are trained, and how much memory weights and gradients take."""
    adapters = monitor.integrator.adapters
    active = adapter_parameters(adapters)
    table = Table(title="adapters", title_justify="left", show_footer=True)
    table.add_column(layers_title(monitor.map), "all")
    for title, footer in (
        ("number", str(len(adapters))),
        ("out x in", ""),
        ("rank", _span(layer.rank for layer in adapters.values())),
        ("at most", _span(layer.max_rank for layer in adapters.values())),
        ("parameters", f"{active:,}"),
    ):
        table.add_column(title, footer, justify="right")
    for kind, label in monitor.map.short_kinds().items():
        layers = {name: adapters[name] for name in monitor.map.of_kind(kind)}
        shapes = dict.fromkeys(f"{layer.out_features} x {layer.in_features}" for layer in layers.values())
        table.add_row(
            Text(label),
            str(len(layers)),
            next(iter(shapes)) if len(shapes) == 1 else f"{len(shapes)} shapes",
            _span(layer.rank for layer in layers.values()),
            _span(layer.max_rank for layer in layers.values()),
            f"{adapter_parameters(layers):,}",
        )
    own = base_parameters(model).values()
    factors = [getattr(layer, name) for layer in adapters.values() for name in FACTORS]
    trained = [p for p in model.parameters() if p.requires_grad]
    largest, probing = (
        sum(columns(layer) * (layer.in_features + layer.out_features) for layer in adapters.values())
        for columns in (attrgetter("max_rank"), attrgetter("probes"))
    )
    counts = Counts.of(model, adapters)
    probes = f", {probing:,} of probes (in no exported file)" if probing else ""
    lines = [
        f"trained: {counts}",
        f"allocated: {_count(trained):,} parameters, trainable in Lightning's summary: {largest:,} of adapters at "
        f"their largest{probes}, and {counts.in_full:,} in full",
        f"memory: {_size(own)} of weights, {_size(factors)} of adapters, {_size(trained)} of gradients, besides the "
        "optimizer's state",
    ]
    return table, lines


def rank_table(monitor: RankMonitor) -> Table:
    """Ranks by kind of layer (rows) and depth, their mean before and after, and the parameters."""
    adapters = monitor.integrator.adapters
    sizes = {name: layer.in_features + layer.out_features for name, layer in adapters.items()}
    return depth_table(monitor.map, monitor.integrator.ranks(), sizes, monitor.before)


def end_summary(trainer: L.Trainer, model: nn.Module, monitor: RankMonitor) -> tuple[Table, list[str]]:
    """Ranks found and how they moved, scores, time, and where the files are; the model may be merged by then."""
    adapters = monitor.integrator.adapters
    table = rank_table(monitor)
    lines = [f"trained: {Counts.of(model, adapters)}"]
    capped = sum(layer.rank == layer.max_rank for layer in adapters.values())
    if capped:
        lines.append(f"at max_rank: {capped} of {len(adapters)} adapters; if these are many, a larger one may help")
    scores = {name: value for name, value in trainer.callback_metrics.items() if is_score(name)}
    lines += [f"{name}: {float(value):.4f}" for name, value in scores.items()]
    adapting = monitor.clock.total()
    lines.append(
        f"time: {in_words(monitor.seconds)}, {in_words(adapting)} of it ({adapting / monitor.seconds:.1%}) for "
        f"{monitor.clock.count} adaptations of the ranks"
    )
    device = monitor.clock.device
    if device.type == "cuda":
        lines.append(f"memory: {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB at most on {device}")
    lines += _files(trainer)
    return table, lines


def _files(trainer: L.Trainer) -> list[str]:
    lines = []
    for logger in trainer.loggers:
        folder = getattr(logger, "log_dir", None) or logger.save_dir
        if folder and f"logs: {folder}" not in lines:
            lines.append(f"logs: {folder}")
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint):
            continue
        if callback.monitor and callback.best_model_score is not None:
            score = f"{callback.monitor} {float(callback.best_model_score):.4f}"
            lines.append(f"best checkpoint: {_relative(callback.best_model_path)} ({score})")
        if last := callback.last_model_path or ("" if callback.monitor else callback.best_model_path):
            lines.append(f"last checkpoint: {_relative(last)}")
    return lines


def _relative(path: str) -> str:
    return str(Path(path).relative_to(Path.cwd())) if Path(path).is_relative_to(Path.cwd()) else path


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _span(values: Iterable[int]) -> str:
    low, high = min(found := list(values)), max(found)
    return str(low) if low == high else f"{low} to {high}"


def _size(parameters: Iterable[nn.Parameter]) -> str:
    size = float(sum(p.numel() * p.element_size() for p in parameters))
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"
