"""Time of the parts of a training step, of methods that take turns, step by step in one process."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import mean, median, quantiles
from typing import Any

import harness
import torch
from methods import LRS, METHODS, AdaLoRA, Full, GeoLoRA, LoRA, Method, Training
from random_models import Setup
from tasks import Batch, Task, on
from torch import nn

from geolora_pl.math.ranks import usual_cadence

PARTS = ("forward", "backward", "optimizer", "adaptation")
BASES = ("bound", "lora", "adalora", "full")  # what the others are measured by
WARMUP = 5  # rounds that do not count

Times = dict[str, list[dict[str, float]]]  # of each method, a step after the other: seconds of the parts, and the loss


class Bound(Full):
    """The least that a method can take: frozen layers without adapters, gradients of the activations alone.

    These go down to the outputs of the first layers that the others adapt. The head is trained, as by all.
    """

    def start(self, task: Task, model: nn.Module, lr: float) -> Training:
        model.requires_grad_(False)

        def ask_for_gradient(layer: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if torch.is_grad_enabled() and not output.requires_grad:
                output.requires_grad_(True)

        for name in task.targets:
            model.get_submodule(name).register_forward_hook(ask_for_gradient)
        return super().start(task, model, lr)


def compared(rank: int) -> dict[str, Method]:
    """The methods with so many columns for each adapter, all of them live; ``defaults`` is this package's own.

    ``room`` has 64 of them of which 6 stay live, to see what the others cost. AdaLoRA goes to that rank from one and a
    half times as many, as its authors do.
    """
    return {
        "geolora": GeoLoRA(adapter={"init_rank": rank, "max_rank": rank}, callback={"adapt_until": 1e-9}),
        "defaults": METHODS["geolora"],
        "room": GeoLoRA(adapter={"init_rank": 6, "max_rank": 64}, callback={"adapt_until": 1e-9}),
        "lora": LoRA({"r": rank, "lora_alpha": rank}),
        "adalora": AdaLoRA(rank),
        "full": METHODS["full"],
        "bound": Bound(),
    }


def start(setup: Setup, task: Task, method: Method, name: str) -> Training:
    """A method at the third learning rate of its sweep in ``compare.py``, where most are at their best."""
    rates = LRS["geolora" if name in ("defaults", "room") else "full" if name == "bound" else name]
    training = method.start(task, task.make_model(0).to(setup.device), rates[min(2, len(rates) - 1)])
    training.model.train()
    return training


class Stopwatch:
    """The time between marks, without a pause of the device at any of them but the last."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self._marks: list[Any] = []
        if self._cuda:
            torch.cuda.synchronize()

    def mark(self) -> None:
        """End what was before."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(harness.now())

    def seconds(self) -> list[float]:
        """From each mark to the next."""
        pairs = list(zip(self._marks[:-1], self._marks[1:], strict=True))
        if not self._cuda:
            return [end - start for start, end in pairs]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def step(setup: Setup, training: Training, batch: Batch, number: int) -> dict[str, float]:
    """Take one step.

    Returns:
        Seconds of its parts, and the loss.
    """
    watch = Stopwatch(setup.device)
    watch.mark()
    training.optimizer.zero_grad()
    with setup.autocast():
        loss = training.model(**batch).loss
    watch.mark()
    loss.backward()
    watch.mark()
    training.optimizer.step()
    watch.mark()
    training.after_step(number)
    watch.mark()
    return {**dict(zip(PARTS, watch.seconds(), strict=True)), "loss": loss.item()}


def turns(
    setup: Setup, trainings: Mapping[str, Training], batches: Iterator[Batch], numbers: Iterable[int]
) -> Iterator[dict[str, dict[str, float]]]:
    """Let every method take a step on the same batch, in an order that is drawn anew in every round.

    Args:
        setup: What is measured.
        trainings: By method.
        batches: One a round.
        numbers: Of the steps.

    Yields:
        What :func:`step` found, by method.
    """
    order = list(trainings)
    draw = random.Random(0)
    gc.collect()
    gc.freeze()  # what is there now is not looked through again, and the collections in a round are quick
    for number in numbers:
        batch = on(setup.device, next(batches))
        draw.shuffle(order)
        gc.collect()
        gc.disable()  # as timeit does
        found = {name: step(setup, trainings[name], batch, number) for name in order}
        gc.enable()
        yield found
    gc.unfreeze()


def measure(setup: Setup, task: Task, methods: Mapping[str, Method], rounds: int) -> Times:
    """Times of the methods in the middle of a run, after a warm-up."""
    trainings = {name: start(setup, task, method, name) for name, method in methods.items()}
    numbers = range(task.steps // 2 - WARMUP, task.steps // 2 + rounds)
    found = list(turns(setup, trainings, task.batches(0), numbers))[WARMUP:]
    return {name: [of_round[name] for of_round in found] for name in methods}


def summary(times: Times, amount: int) -> dict[str, dict[str, Any]]:
    """What a step costs: medians over the rounds, and quartiles of ratios to the others in the same round.

    An adaptation comes in some steps only, so each of them takes its part of it: the mean, over the steps from one to
    the next, of the median at each.

    Args:
        times: Seconds by method.
        amount: Tokens or images a step.
    """
    adaptation = {name: _spread_out([s["adaptation"] for s in steps]) for name, steps in times.items()}
    total = {
        name: [sum(s[part] for part in PARTS[:-1]) + adaptation[name] for s in steps] for name, steps in times.items()
    }
    found = {}
    for name, steps in times.items():
        ms = {part: 1e3 * median(s[part] for s in steps) for part in PARTS[:-1]}
        over = {}
        for base in BASES:
            if base in times and base != name:
                over[base] = quartiles([ours / theirs for ours, theirs in zip(total[name], total[base], strict=True)])
        found[name] = {
            "ms": round(1e3 * median(total[name]), 3),
            **{part: round(value, 3) for part, value in (ms | {"adaptation": 1e3 * adaptation[name]}).items()},
            "share": round(adaptation[name] / median(total[name]), 5),
            "a_second": round(amount / median(total[name]), 1),
            "over": over,
        }
    return found


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median and upper quartile."""
    return [round(value, 4) for value in quantiles(values, n=4, method="inclusive")]


def _spread_out(seconds: Sequence[float]) -> float:
    cadence = min(usual_cadence(float("inf")), len(seconds))
    return mean(median(seconds[phase::cadence]) for phase in range(cadence))


def time_to_loss(
    setup: Setup, task: Task, methods: Mapping[str, Method], target: float
) -> dict[str, dict[str, float | None]]:
    """Train until the mean loss of a pass through the batches is at most the target, with the package's schedule.

    Args:
        setup: What is measured.
        task: Its steps are the length of the run.
        methods: By name.
        target: Loss.

    Returns:
        ``steps`` and ``seconds`` to the target, ``None`` where it was not reached, and the last ``loss``.
    """
    trainings = {name: start(setup, task, method, name) for name, method in methods.items()}
    schedules = [harness.schedule(training.optimizer, task.steps) for training in trainings.values()]
    times: Times = {name: [] for name in methods}
    a_pass = task.train.size // task.batch_size
    reached: dict[str, dict[str, float | None]] = {}
    for of_round in turns(setup, trainings, task.batches(0), range(task.steps)):
        for schedule in schedules:
            schedule.step()
        for name, of_step in of_round.items():
            times[name].append(of_step)
            loss = mean(s["loss"] for s in times[name][-a_pass:])
            if name not in reached and len(times[name]) >= a_pass and loss <= target:
                seconds = sum(s[part] for s in times[name] for part in PARTS)
                reached[name] = {"steps": len(times[name]), "seconds": round(seconds, 2)}
        if len(reached) == len(methods):
            break
    last = {name: round(mean(s["loss"] for s in steps[-a_pass:]), 4) for name, steps in times.items()}
    return {name: reached.get(name, {"steps": None, "seconds": None}) | {"loss": last[name]} for name in methods}
