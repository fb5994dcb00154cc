"""What it costs to watch the ranks: the part of the quickstart's time that numbers, pictures and tables take.

    python benchmarks/speed/monitor_cost.py

Everything that the callback does is counted except the retraction itself: reading and logging its numbers, drawing its
pictures, printing its tables. Times are those of the processor, so that other work on the machine does not count.
Results go to ``benchmarks/results/monitor_cost.json``.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is found from where this script lies

import argparse
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console

from benchmarks.shared import results
from benchmarks.shared.paths import ROOT
from geolora_pl import GeoLoRACallback
from geolora_pl.cli.dispatch import main as run_command
from geolora_pl.lightning.monitor import RankMonitor
from geolora_pl.lightning.run import Run
from geolora_pl.training.clock import DeviceClock

PARTS = {
    GeoLoRACallback: ("on_train_start", "on_train_batch_end", "on_train_epoch_end", "on_train_end", "on_fit_end"),
    RankMonitor: ("show", "numbers"),  # parts of those above
    DeviceClock: ("now", "add"),
}
RETRACTION = "retract_pending"  # called within two of the hooks, and not a part of the cost


def timed(function: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    """The function, with the time of its calls added up in ``spent``."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        began = time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] += time.thread_time() - began

    return wrapper


def measure() -> tuple[float, dict[str, float]]:
    """Seconds of a whole fit, and of its parts."""
    spent: dict[str, float] = defaultdict(float)
    for owner, names in {**PARTS, Run: (RETRACTION,)}.items():
        for name in names:
            setattr(owner, name, timed(getattr(owner, name), spent, name))
    ends: list[float] = []
    on_fit_start, on_fit_end = GeoLoRACallback.on_fit_start, GeoLoRACallback.on_fit_end

    def at(hook: Callable[..., None]) -> Callable[..., None]:
        def wrapper(*args: Any) -> None:
            hook(*args)
            ends.append(time.process_time())

        return wrapper

    GeoLoRACallback.on_fit_start, GeoLoRACallback.on_fit_end = at(on_fit_start), at(on_fit_end)  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("configs").symlink_to(ROOT / "configs")
        run_command(["fit", "--config", "configs/quickstart.yaml", "--trainer.enable_progress_bar=false"])
        os.chdir(ROOT)
    return ends[1] - ends[0], spent


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    whole, spent = measure()
    total = sum(spent[name] for owner in (GeoLoRACallback, DeviceClock) for name in PARTS[owner]) - spent[RETRACTION]
    found = {**spent, "in all": total, "of a fit of": whole}
    seconds = {name: round(value, 4) for name, value in found.items()}
    command = "python benchmarks/speed/monitor_cost.py"
    results.write("monitor_cost", command, {"seconds": seconds, "share": round(total / whole, 4)})
    console = Console()
    for name, value in seconds.items():
        console.print(f"{name}: {value:.3f} s, {value / whole:.2%}")


if __name__ == "__main__":
    main()
