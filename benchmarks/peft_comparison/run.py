"""A run of this package by the scripts of PEFT's comparison of methods on MetaMathQA, which write a row of its results.

    python benchmarks/peft_comparison/run.py PEFT/method_comparison/MetaMathQA EXPERIMENT

Model, data, order, steps, batches, schedule, clipping, evaluation and the JSON are those of the scripts, which stand in
a checkout of PEFT and are not changed: for the time of a run, a few names in them mean something else. EXPERIMENT is a
folder with ``adapter_config.json``, which has arguments of ``AdapterConfig`` and of ``RankAdaptiveIntegrator``, and
with ``training_params.json``, as the comparison reads it; by default that of this folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is found from where this script lies

import argparse
import json
from collections.abc import Sequence
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.optim import Optimizer

from geolora_pl import AdapterConfig, RankAdaptiveIntegrator, RiemannianAdam, inject_adapters, save_adapter

EXPERIMENT = Path(__file__).parent / "experiments" / "geolora" / "llama-3.2-3B-rank64-budget9M"
WEIGHTS = "adapter_model.safetensors"  # whose size the scripts read


class GeoLoRA:
    """What stands in the place of a method of PEFT in its scripts.

    Args:
        folder: Of the experiment.
        scripts: The module ``run`` of the comparison.
    """

    def __init__(self, folder: Path, scripts: Any) -> None:
        self.settings = json.loads((folder / "adapter_config.json").read_text())
        self._theirs = {name: getattr(scripts, name) for name in ("get_model", "get_optimizer_and_scheduler")}
        self.integrator: RankAdaptiveIntegrator | None = None

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it stands in the row, with what the run has found."""
        assert self.integrator is not None
        found = {"parameters": self.integrator.adapter_parameters(), "ranks": self.integrator.ranks()}
        return {"peft_type": "GEOLORA", **self.settings, "found": found}

    def get_model(self, *, peft_config: object, **settings: Any) -> nn.Module:
        """The model of the scripts with adapters; it says how many parameters are trained, and saves those alone."""
        model: Any = self._theirs["get_model"](peft_config=None, **settings)
        inject_adapters(model, AdapterConfig(**self.settings["adapter"]))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        model.get_nb_trainable_parameters = lambda: (trained, sum(p.numel() for p in model.parameters()))
        model.save_pretrained = lambda folder: save_adapter(model, Path(folder) / WEIGHTS)
        return model  # type: ignore[no-any-return]

    def get_optimizer_and_scheduler(
        self, model: nn.Module, *, max_steps: int, **settings: Any
    ) -> tuple[Optimizer, Any]:
        """The optimizer and the schedule of the scripts; the ranks adapt after a step of the optimizer."""
        optimizer, schedule = self._theirs["get_optimizer_and_scheduler"](model, max_steps=max_steps, **settings)
        integrator = self.integrator = RankAdaptiveIntegrator(model, **self.settings["integrator"])
        steps = 0

        def after_step(*arguments: object) -> None:
            nonlocal steps
            steps += 1
            integrator.step(optimizer)
            if steps == max_steps:
                integrator.retract(optimizer)  # what is pending, before the last evaluation

        optimizer.register_step_post_hook(after_step)
        return optimizer, schedule


def run(scripts: Any, folder: Path) -> None:
    """Let the comparison run an experiment.

    Args:
        scripts: The module ``run`` of the comparison.
        folder: Of the experiment, ``METHOD/NAME``.
    """
    method = GeoLoRA(folder, scripts)
    experiment = "/".join(folder.parts[-2:])
    config = mock.Mock(from_pretrained=lambda path: method)
    with (
        mock.patch.object(torch.optim, "RiemannianAdam", RiemannianAdam, create=True),  # where it looks for optimizers
        mock.patch.multiple(
            scripts,
            PeftConfig=config,
            get_model=method.get_model,
            get_optimizer_and_scheduler=method.get_optimizer_and_scheduler,
            print_verbose=lambda *text: print(*text, file=sys.stderr),
            create=True,
        ),
    ):
        scripts.main(path_experiment=str(folder), experiment_name=experiment, clean=True, bucket_name=None)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", type=Path, help="the folder method_comparison/MetaMathQA of a checkout of PEFT")
    parser.add_argument("experiment", type=Path, nargs="?", default=EXPERIMENT)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(arguments)
    for path in (args.scripts / "run.py", args.experiment / "adapter_config.json"):
        if not path.is_file():
            parser.error(f"{path} is not there")
    sys.path.insert(0, str(args.scripts))
    run(import_module("run"), args.experiment.resolve())


if __name__ == "__main__":
    main()
