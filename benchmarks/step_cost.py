"""Time of a training step on a ViT with random weights: this package beside LoRA, AdaLoRA and full fine-tuning.

    python benchmarks/step_cost.py --size tiny

The methods take turns, step by step in one process, so that what else the machine does meets all of them alike. A step
is told apart into forward, backward, the optimizer's step, and what the method does after it (retraction, allocation).
The bound is the same model with frozen linear layers and no adapters. Results go to ``benchmarks/results`` and
``docs/figures``.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from statistics import mean, median, quantiles
from typing import Any

import figures
import harness
import timm
import torch
from image_tasks import WithLoss
from methods import LRS, METHODS, Full, Method, Training
from rich.console import Console
from rich.table import Table
from sweep import RESULTS
from tasks import Batch, Samples, Task, on
from torch import Tensor, nn

from geolora_pl import AdapterConfig, inject_adapters

PARTS = ("forward", "backward", "optimizer", "after")
WARMUP = 3  # rounds that do not count
RUN = 1000  # steps of the run that the rounds are taken from the middle of: cadence and phases depend on it
BASELINE = "lora"

Times = dict[str, list[dict[str, float]]]  # of each method, a round after the other


class Bound(Full):
    """Frozen linear layers without adapters; the norms are trained, so that the gradient goes all the way down."""

    def start(self, task: Task, model: nn.Module, lr: float) -> Training:
        model.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.requires_grad_(True)
        return super().start(task, model, lr)


COMPARED: dict[str, Method] = {**{m: METHODS[m] for m in ("geolora", "lora", "adalora", "full")}, "bound": Bound()}


def vit(size: str, batch_size: int) -> Task:
    """A ViT for images of 224 pixels with random weights, and one random batch.

    Args:
        size: ``tiny``, ``small`` or ``base``.
        batch_size: Images.
    """

    def make_model(seed: int) -> WithLoss:
        torch.manual_seed(seed)
        return WithLoss(timm.create_model(f"vit_{size}_patch16_224", num_classes=100))

    batch = {"images": torch.randn(batch_size, 3, 224, 224), "labels": torch.arange(batch_size) % 100}
    samples = Samples(batch_size, lambda index: batch)
    heads = ["model.head"]
    targets = list(inject_adapters(make_model(0), AdapterConfig(modules_to_save=heads)))
    return Task(f"vit_{size}", make_model, samples, samples, 100, ["accuracy"], targets, heads, batch_size, RUN, 1e-3)


def measure(task: Task, methods: dict[str, Method], rounds: int, device: str = "cpu") -> tuple[Times, dict[str, float]]:
    """Let the methods take turns, in the middle of the task's run.

    Args:
        task: Whose first batch is trained on again and again.
        methods: By name.
        rounds: Steps of each method, without the warm-up.
        device: Where.

    Returns:
        Seconds of the parts of every step, and megabytes that each method's forward keeps for the backward.
    """
    batch = on(device, next(task.batches(0)))
    trainings = {
        name: m.start(task, task.make_model(0).to(device), LRS.get(name, (1e-3,))[0]) for name, m in methods.items()
    }
    memory = {name: kept(training, batch) for name, training in trainings.items()}
    times: Times = {name: [] for name in methods}
    order = list(methods)
    shuffle = random.Random(0)
    for number in range(-WARMUP, rounds):
        shuffle.shuffle(order)
        for name in order:
            seconds = _step(trainings[name], batch, task.steps // 2 + number)
            if number >= 0:
                times[name].append(seconds)
    return times, memory


def _step(training: Training, batch: Batch, number: int) -> dict[str, float]:
    marks = [harness.now()]
    training.optimizer.zero_grad()
    loss = training.model(**batch).loss
    marks.append(harness.now())
    loss.backward()
    marks.append(harness.now())
    training.optimizer.step()
    marks.append(harness.now())
    training.after_step(number)
    marks.append(harness.now())
    return {part: end - start for part, start, end in zip(PARTS, marks[:-1], marks[1:], strict=True)}


def kept(training: Training, batch: Batch) -> float:
    """Megabytes that a forward keeps for the backward, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in training.model.parameters()}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = training.model(**batch)
    del output
    return sum(storages.values()) / 1e6


def summary(times: Times, memory: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Milliseconds of the parts, and quartiles of the step's time over that of ``BASELINE`` in the same round.

    What comes after the optimizer's step comes in some rounds only: every round takes the mean of it.
    """
    after = {name: mean(seconds["after"] for seconds in rounds) for name, rounds in times.items()}
    spread_out = {name: [seconds | {"after": after[name]} for seconds in rounds] for name, rounds in times.items()}
    base = [sum(seconds.values()) for seconds in spread_out[BASELINE]]
    found = {}
    for name, rounds in spread_out.items():
        ratios = [sum(seconds.values()) / other for seconds, other in zip(rounds, base, strict=True)]
        found[name] = {
            **{part: round(1e3 * median(seconds[part] for seconds in rounds), 3) for part in PARTS},
            "ratio": [round(quartile, 4) for quartile in quantiles(ratios, n=4)],
            "kept_mb": round(memory[name], 2),
        }
    return found


def rows(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Cells of the table, a row a method."""
    lines = []
    for name, values in found.items():
        low, middle, high = values["ratio"]
        parts = [values[part] for part in PARTS]
        cells = [f"{sum(parts):.1f}", *(f"{ms:.1f}" for ms in parts)]
        lines.append([name, f"{middle:.3f} ({low:.3f} to {high:.3f})", *cells, f"{values['kept_mb']:.0f}"])
    return lines


HEADER = ["method", "time over LoRA's (quartiles)", "ms a step", *PARTS, "MB kept for backward"]


def draw(found: dict[str, dict[str, Any]], name: str) -> None:
    """Parts of a step as stacked bars."""
    figure, (ax,) = figures.panels(1)
    names = list(found)[::-1]
    left = [0.0] * len(names)
    for part in PARTS:
        width = [found[name][part] for name in names]
        ax.barh(names, width, left=left, label=part)
        left = [a + b for a, b in zip(left, width, strict=True)]
    ax.set(xlabel="milliseconds a step", title=name)
    ax.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figures.save(figure, f"step_cost_{name}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "small", "base"), default="tiny")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=30, help="a multiple of the cadence of retractions, 10")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    task = vit(args.size, args.batch_size)
    found = summary(*measure(task, COMPARED, args.rounds, device))
    draw(found, task.name)
    command = "python benchmarks/step_cost.py " + " ".join(f"--{name} {value}" for name, value in vars(args).items())
    content = {"command": command, "machine": harness.machine(), "results": found}
    (RESULTS / f"step_cost_{task.name}.json").write_text(json.dumps(content, indent=1) + "\n")
    table = Table(*HEADER)
    for row in rows(found):
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
