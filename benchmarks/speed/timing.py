"""Time of the parts of a training step, for methods that take turns at every step in one process."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import mean, median, quantiles
from typing import Any

import torch
from torch import nn

from benchmarks.shared import harness
from benchmarks.shared.methods import LRS, METHODS, AdaLoRA, Full, GeoLoRA, LoRA, Method, Training
from benchmarks.shared.task import Batch, Task, to_device
from benchmarks.speed.random_models import Setup
from geolora_pl.math.ranks import usual_cadence

PARTS = ("forward", "backward", "optimizer", "adaptation")
BASES = ("bound", "lora", "adalora", "full")  # the methods that the others are divided by
WARMUP = 5  # rounds that are not counted

Times = dict[str, list[dict[str, float]]]  # for each method, the seconds of the parts of every step, and its loss


class Bound(Full):
    """The least that a method can take: frozen layers without adapters, and gradients of the activations alone.

    The gradients go down to the outputs of the first layers that the others adapt. The head is trained, as always.
    """

    def start(self, task: Task, model: nn.Module, lr: float) -> Training:
        model.requires_grad_(False)

        def ask_for_gradient(layer: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if torch.is_grad_enabled() and not output.requires_grad:
                output.requires_grad_(True)

        for name in task.targets:
            model.get_submodule(name).register_forward_hook(ask_for_gradient)
        return super().start(task, model, lr)


def compared_at(rank: int) -> dict[str, Method]:
    """The methods with ``rank`` columns per adapter, all of them live; ours find directions by their probes as ever.

    ``defaults`` is this package with its default ``max_rank``. ``room`` has 64 columns of which 6 stay live, to show
    what unused columns cost. AdaLoRA ends at the given rank and starts at one and a half times as much, as its
    authors do.
    """
    return {
        "geolora": GeoLoRA(adapter={"init_rank": rank, "max_rank": rank}, callback={"min_rank": rank}),
        "defaults": METHODS["geolora"],
        "room": GeoLoRA(adapter={"init_rank": 6, "max_rank": 64}, callback={"adapt_until": 1e-9}),
        "lora": LoRA({"r": rank, "lora_alpha": rank}),
        "adalora": AdaLoRA(rank),
        "full": METHODS["full"],
        "bound": Bound(),
    }


def start(setup: Setup, task: Task, method: Method, name: str) -> Training:
    """Start a method at the third learning rate of its sweep in ``compare.py``, at which most do best."""
    rates = LRS["geolora" if name in ("defaults", "room") else "full" if name == "bound" else name]
    training = method.start(task, task.make_model(0).to(setup.device), rates[min(2, len(rates) - 1)])
    training.model.train()
    return training


class Stopwatch:
    """Measures the time between marks; the device is waited for at the last of them only."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self._marks: list[Any] = []
        if self._cuda:
            torch.cuda.synchronize()

    def mark(self) -> None:
        """End the part before and begin the next one."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(harness.now())

    def seconds(self) -> list[float]:
        """Seconds from each mark to the next."""
        pairs = list(zip(self._marks[:-1], self._marks[1:], strict=True))
        if not self._cuda:
            return [end - start for start, end in pairs]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def step(setup: Setup, training: Training, batch: Batch, number: int) -> dict[str, float]:
    """Take one step.

    Returns:
        The seconds of its parts, and the loss.
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
    """Let every method take a step on the same batch, in a random order that differs from round to round.

    Args:
        setup: What is measured.
        trainings: Training of each method.
        batches: One batch per round.
        numbers: Numbers of the steps.

    Yields:
        For each round, the result of :func:`step` by method.
    """
    order = list(trainings)
    draw = random.Random(0)
    gc.collect()
    gc.freeze()  # objects that exist now are not searched again, so that the collections below are quick
    for number in numbers:
        batch = to_device(next(batches), setup.device)
        draw.shuffle(order)
        gc.collect()
        gc.disable()  # no collection falls into a measurement, as in timeit
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
    """What a step costs: medians over the rounds, and quartiles of the ratios to other methods in the same round.

    Only some steps adapt ranks, so every step is charged its part of an adaptation: the medians at each step of the
    cadence, averaged over the cadence.

    Args:
        times: Seconds by method.
        amount: Tokens or images per step.
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
    """Train with this package's schedule until the mean loss over all batches is at most the target.

    Args:
        setup: What is measured.
        task: What to train on; its steps are the length of the run.
        methods: Methods by name.
        target: The loss to reach.

    Returns:
        ``steps`` and ``seconds`` until the target, which are ``None`` where it was not reached, and the last ``loss``.
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
