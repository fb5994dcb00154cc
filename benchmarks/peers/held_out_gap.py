"""Why full fine-tuning is ahead of adapters on ``held_out``: it, with parts left out, and adapters with parts added.

    python benchmarks/peers/held_out_gap.py

Results are appended to ``benchmarks/results/held_out_gap.jsonl``, one line per run; a run that is there already is not
repeated.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is found from where this script lies

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from torch import nn

from benchmarks.shared import sweep
from benchmarks.shared.methods import Full, GeoLoRA, LoRA, Method, Training, default_lr
from benchmarks.shared.paths import RESULTS
from benchmarks.shared.summary import Records, spread, summaries
from benchmarks.shared.sweep import Planned
from benchmarks.shared.tables import table
from benchmarks.shared.task import Task

TASK = "held_out"
_LINEARS = r"(qkv|proj|fc1|fc2)\.weight$"
_EMBEDDINGS = r"patch_embed|pos_embed|cls_token"


@dataclass(frozen=True)
class Parts(Full):
    """Full fine-tuning of the head and of the parameters whose names a regular expression finds.

    Args:
        trained: The expression.
    """

    trained: str = ""

    def settings(self) -> dict[str, Any]:
        return {"trained": self.trained}

    def start(self, task: Task, model: nn.Module, lr: float) -> Training:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(re.search(self.trained, name) is not None)
        return super().start(task, model, lr)


@dataclass(frozen=True)
class Beside(GeoLoRA):
    """This package with more trained in full beside the adapters, which then counts among the adapted parameters.

    Args:
        modules: A regular expression that finds the names of modules that learn at the rate of the head.
    """

    modules: str = r"(?!)"  # finds nothing

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "modules": self.modules}

    def start(self, task: Task, model: nn.Module, lr: float) -> Training:
        more = [name for name, _ in model.named_modules() if re.search(self.modules, name)]
        training = super().start(replace(task, heads=[*task.heads, *more]), model, lr)
        head = sum(p.numel() for name in task.heads for p in model.get_submodule(name).parameters())
        in_full = [group["params"] for group in training.optimizer.param_groups if not group.get("adapters")]
        beside = sum(p.numel() for parameters in in_full for p in parameters) - head
        return replace(training, parameters=lambda: training.parameters() + beside)


_RATES = (1e-3, 3e-3)
VARIANTS: dict[str, tuple[Method, tuple[float, ...]]] = {
    "full fine-tuning": (Full(), _RATES),
    "without embeddings": (Parts(f"^(?!.*({_EMBEDDINGS}))"), _RATES),
    "without norms": (Parts(r"^(?!.*norm)"), _RATES),
    "without biases": (Parts(r"^(?!.*bias)"), _RATES),
    "linear weights of the blocks alone": (Parts(rf"blocks.*{_LINEARS}"), _RATES),
    "geolora_pl": (GeoLoRA(), (default_lr(),)),
    "with biases": (Beside(adapter={"train_bias": "all"}), (default_lr(),)),
    "with norms": (Beside(modules=r"norm\d?$"), (default_lr(),)),
    "with the patch embedding": (Beside(modules=r"patch_embed\.proj$"), (default_lr(),)),
    "with norms, biases and the patch embedding": (
        Beside(adapter={"train_bias": "all"}, modules=r"norm\d?$|patch_embed\.proj$"),
        (default_lr(),),
    ),
    "tau 0.1, max_rank 64": (GeoLoRA(adapter={"max_rank": 64}, callback={"tau": 0.1}), (default_lr(),)),
    "LoRA r 8": (LoRA(), (3e-3, 1e-2)),
    "LoRA r 32": (LoRA({"r": 32, "lora_alpha": 32}), (1e-3, 3e-3, 1e-2)),
}


def rows(records: Records) -> list[list[str]]:
    """One row per variant: its score, its learning rate, and what it trains besides the head."""
    found = summaries(records)
    return [
        [name, spread(of_name.scores.values()), f"{of_name.lr:g}", f"{of_name.parameters:,.0f}"]
        for (_, name), of_name in found.items()
    ]


HEADER = ("what is trained", "score", "lr", "adapted parameters")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = sweep.make_parser(__doc__, [TASK], RESULTS / "held_out_gap.jsonl")
    args = parser.parse_args(arguments)
    runs, steps = sweep.start(Path(__file__), args)
    planned = [
        Planned(TASK, steps[TASK], name, method, lr, 0) for name, (method, rates) in VARIANTS.items() for lr in rates
    ]
    found = runs.make(planned)
    Console().print(table(HEADER, rows(found + runs.repeat(planned, found, args.seeds))))


if __name__ == "__main__":
    main()
