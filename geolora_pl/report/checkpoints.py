"""The part of a report about checkpoints: epoch, step and scores of each, and the singular values in the last one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from geolora_pl.report import figures, html
from geolora_pl.report.identity import tau_of
from geolora_pl.report.rank_map import short_names
from geolora_pl.report.runs import Run
from geolora_pl.report.scores import is_of_validation
from geolora_pl.storage.checkpoint import read_checkpoint
from geolora_pl.storage.spectra import checkpoint_spectra

_READ = 20  # checkpoints at most, the last ones, because every byte of them is checked


def checkpoints_table(run: Run) -> str:
    """The checkpoints of a run with what they are of; empty if there are none."""
    scores = {name: dict(curve) for name, curve in run.scores.items() if is_of_validation(name)}
    epochs, rows = dict(run.curves.get("epoch", ())), []
    for i, path in enumerate(run.checkpoints):
        epoch, steps = _place(path) if len(run.checkpoints) - i <= _READ else (None, None)
        last = None if steps is None else steps - 1  # loggers count from 0
        found = [None if last is None else curve.get(last) for curve in scores.values()]
        if last in epochs:  # Lightning counts one more in what it saves at the end of a fit
            epoch = round(epochs[last])
        rows.append(
            [
                path.name,
                *("" if value is None else f"{value:,}" for value in (epoch, steps)),
                *map(html.number, found),
                f"{path.stat().st_size / 1e6:,.1f} MB",
            ]
        )
    head = ["checkpoint", "epoch", "steps", *scores, "size"]
    return html.table(head, rows, "Checkpoints, oldest first") if rows else ""


def _place(path: Path) -> tuple[int | None, int | None]:
    try:
        content = read_checkpoint(path, mmap=True)
    except ValueError:
        return None, None
    epoch, steps = content.get("epoch"), content.get("global_step")
    return (epoch, steps) if isinstance(epoch, int) and isinstance(steps, int) else (None, None)


def spectra(run: Run, order: Iterable[str], salt: str) -> tuple[Sequence[str], str]:
    """Figures of the singular values in the last checkpoint, and what is to be said where there are none.

    Args:
        run: The run.
        order: The adapters, so that their kinds keep the colours of the other figures.
        salt: Unique on the page.
    """
    if not run.checkpoints:
        return [], ""
    last = run.checkpoints[-1]
    try:
        found = checkpoint_spectra(last)
    except ValueError:
        reason = "cannot be read, or holds more than plain values: its singular values are left out"
        return [], f"<p>{escape(last.name)} {reason}</p>"
    short = short_names(found)
    by_name: Mapping[str, Sequence[float]] = {short[name]: sigma for name, sigma in found.items()}
    ours = short_names(order).values()
    sigmas = {name: by_name[name] for name in [*filter(by_name.__contains__, ours), *by_name]}
    if not sigmas:
        return [], ""
    largest = max((sigma[0] for sigma in sigmas.values() if sigma), default=0.0)
    tau = tau_of(run)
    line = "" if tau is None else f", with tau {tau:g}"
    return [
        html.figure(
            figures.spectra(sigmas, f"singular values in {last.name}"),
            f"Singular values of every update, the largest {largest:.3g}",
            f"{salt}-spectra",
        ),
        html.figure(
            figures.tails(sigmas, tau, "part of an update that a lower rank would lose"),
            f"What each update would lose at a lower rank{line}",
            f"{salt}-tails",
        ),
    ], ""
