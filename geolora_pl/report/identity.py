"""The line at the top of a report: everything that identifies a run."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from geolora_pl.report.metrics import ADAPTER_PARAMS
from geolora_pl.report.record import VERSION, is_number
from geolora_pl.report.runs import Run

_MODEL = ("model.init_args.model_name", "model.class_path")
_DATA = ("data.class_path",)


def identity(run: Run) -> list[str]:
    """What identifies a run, part by part: of what it recorded, or else of its configuration.

    Args:
        run: The run.
    """
    said = run.record
    model = said.get("model") or _setting(run, _MODEL)
    data = said.get("data") or _setting(run, _DATA)
    parts = [f"{model} on {data}" if model and data else str(model or data)]
    parts += [_date(str(said.get("started", ""))), _seed(run), _rate(run)]
    if (tau := tau_of(run)) is not None:
        budget = said.get("budget") or run.settings.get("geolora.budget")
        parts.append(f"tau {tau:g}" + (f", budget {budget:,}" if isinstance(budget, int) else ""))
    parts += [_duration(run), _size(run)]
    if device := said.get("device"):
        processes = said.get("processes")
        parts.append(f"{device} x {processes}" if processes != 1 else str(device))
    parts.append(", ".join(f"{n.removeprefix(VERSION)} {v}" for n, v in said.items() if n.startswith(VERSION)))
    return [part for part in parts if part]


def tau_of(run: Run) -> float | None:
    """The relative tolerance of the run, if it is known."""
    tau = run.record.get("tau", run.settings.get("geolora.tau"))
    return float(tau) if is_number(tau) else None


def _setting(run: Run, names: Iterable[str]) -> str:
    """The first of some settings that is there; of the path of a class its name."""
    for name in names:
        if isinstance(value := run.settings.get(name), str):
            return value.rpartition(".")[2] if name.endswith("class_path") else value
    return ""


def _date(started: str) -> str:
    try:
        return f"{datetime.fromisoformat(started):%Y-%m-%d %H:%M}"
    except ValueError:
        return ""


def _seed(run: Run) -> str:
    seed = run.record.get("seed", run.settings.get("seed_everything"))
    return "" if seed is None else f"seed {seed}"


def _rate(run: Run) -> str:
    settings = "model.init_args.optimizer."
    optimizer = run.record.get("optimizer") or _setting(run, (f"{settings}class_path",))
    lr = run.record.get("lr", run.settings.get(f"{settings}init_args.lr"))
    return f"{optimizer}, lr {lr:g}" if isinstance(lr, (int, float)) else str(optimizer)


def _duration(run: Run) -> str:
    first, last, seconds = (_number(run, name) for name in ("first_step", "last_step", "seconds"))
    if first is None or last is None or not seconds or seconds < 0 or last <= first:
        return ""
    resumed = f", from step {first:,.0f} on" if first else ""
    return f"{in_words(seconds)}{resumed}, {(last - first) / seconds:.3g} steps per second"


def in_words(seconds: float) -> str:
    """A duration.

    Example:
        >>> in_words(31.04), in_words(62), in_words(3720)
        ('31.0 s', '1 min 2 s', '1 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _size(run: Run) -> str:
    base, per_rank = _number(run, "base"), _number(run, "per_rank")
    adapters = run.curves.get(ADAPTER_PARAMS)
    if not adapters or not base or not per_rank or min(base, per_rank) < 0:
        return ""
    return f"adapters {adapters[-1][1] / base:.1%} of the base, as a LoRA of rank {adapters[-1][1] / per_rank:.1f}"


def _number(run: Run, name: str) -> float | None:
    value = run.record.get(name)
    return float(value) if isinstance(value, (int, float)) else None
