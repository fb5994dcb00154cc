"""One training loop for every method."""

from __future__ import annotations

import math
import time
from itertools import islice

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.shared.methods import Method, defaults
from benchmarks.shared.results import Record
from benchmarks.shared.task import Task, to_device
from geolora_pl import GeoLoRAModule
from geolora_pl.training.schedule import WARMUP_POWER, warmup_cosine

EVALUATIONS = 5  # per run, evenly spaced
POINTS = 50  # per loss curve
_LENGTHS = ("warmup", "head_warmup")
SIZES = 30  # counts of the adapter parameters per run, at steps in geometric distance


def run(task: Task, method: Method, lr: float, seed: int) -> Record:
    """Train a model and judge it: by a part of the held-out samples while it trains, and by all of them in the end.

    Model, head and order of the data depend on the seed alone; the schedule is this package's. A run whose loss is no
    longer finite is stopped and judged as it is.

    Args:
        task: What to train on.
        method: How to train.
        lr: Learning rate of what the method trains besides the head.
        seed: Seed.

    Returns:
        ``score`` and the task's metrics, what the task's probe finds, ``losses`` (means over equal parts of the run),
        ``scores`` during the run as ``[step, seconds, score]``, ``sizes`` as ``[step, adapter parameters]``,
        ``seconds`` of training alone, and the active adapter ``parameters``, the ``head_parameters`` and the ``ranks``
        at the end.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = task.make_model(seed).to(device)
    head_parameters = sum(p.numel() for head in task.heads for p in model.get_submodule(head).parameters())
    training = method.start(task, model, lr)
    optimizer = training.optimizer
    rates = schedule(optimizer, task.steps)
    evaluated_at = {round(task.steps * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS)}
    sized_at = {round(task.steps ** (i / (SIZES - 1))) for i in range(SIZES)}

    losses, scores, sizes, seconds = [], [], [], 0.0
    model.train()
    for step, batch in enumerate(islice(task.batches(seed), task.steps)):
        start = now()
        optimizer.zero_grad()
        batch = to_device(batch, device)
        output = training.model(**batch)
        output.loss.backward()
        optimizer.step()
        training.after_step(step)
        rates.step()
        losses.append(task.loss(output.logits.detach(), batch["labels"]).item())  # without a method's penalty
        seconds += now() - start
        if not math.isfinite(losses[-1]):
            break
        if step + 1 in sized_at:
            sizes.append([step + 1, training.parameters()])
        if step + 1 in evaluated_at:
            whole = step + 1 == task.steps
            logits, labels = task.predict(training.model, task.dev.size if whole else task.part)
            score = task.judge(logits[: task.part], labels[: task.part])["score"]
            scores.append([step + 1, round(seconds, 2), round(score, 4)])
    if len(losses) < task.steps or not math.isfinite(losses[-1]):
        logits, labels = task.predict(training.model, task.dev.size)
    return {
        **{name: round(value, 5) for name, value in task.judge(logits, labels).items()},
        **task.probe(model),
        "losses": _thinned(losses),
        "scores": scores,
        "sizes": sizes,
        "seconds": round(seconds, 2),
        "parameters": training.parameters(),
        "head_parameters": head_parameters,
        "ranks": list(training.ranks()),
    }


def schedule(optimizer: Optimizer, steps: int) -> LambdaLR:
    """The schedule, this package's for every method; a head alone has its short warm-up."""
    lengths = {name: defaults(GeoLoRAModule)[name] for name in _LENGTHS}
    if not any(group.get("adapters") for group in optimizer.param_groups):
        lengths["warmup"] = lengths["head_warmup"]
    return warmup_cosine(optimizer, total_steps=steps, **lengths)


def warmup() -> dict[str, float]:
    """What the warm-up is, this package's default for every method: its lengths, and the power of the step."""
    return {**{name: defaults(GeoLoRAModule)[name] for name in _LENGTHS}, "power": WARMUP_POWER}


def now() -> float:
    """Seconds; on one thread of a CPU those of this process alone, so that other work of the machine hardly counts."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _thinned(losses: list[float]) -> list[float]:
    """Means over at most ``POINTS`` equal parts, to four digits; a loss that is not finite ends the curve."""
    finite = torch.tensor([loss for loss in losses if math.isfinite(loss)])
    return [float(f"{part.mean():.4g}") for part in finite.tensor_split(min(POINTS, max(1, len(finite)))) if len(part)]
