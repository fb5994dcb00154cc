"""What a task of the benchmarks is: a model, its data, and how it is judged.

Every model here takes keyword tensors, ``labels`` among them, and returns ``loss`` and ``logits``, as the models of
transformers do, because PEFT's AdaLoRA adds its penalty only to a loss that the model itself returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geolora_pl.data.texts.sampler import ShuffledSampler
from geolora_pl.tasks.metrics import make_metrics

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Samples:
    """Samples in memory.

    Attributes:
        size: Number of samples.
        batch: Makes a batch of the samples with the given indices.
        lengths: Length of each sample, where they differ.
    """

    size: int
    batch: Callable[[Sequence[int]], Batch]
    lengths: Sequence[int] | None = None


@dataclass(frozen=True)
class Task:
    """What is trained on what, and how it is judged.

    Attributes:
        name: Name.
        make_model: Returns the pretrained model with a new head; everything random in it depends on the seed alone.
        train: Training samples.
        dev: Held-out samples in random order, so that the first ``part`` of them can judge a run while it trains.
        num_classes: Number of classes, or 1 for a regression.
        metrics: Names of the package's metrics; the score is their mean.
        targets: Names of the layers that are adapted.
        heads: Names of what comes after the body, such as the new head: trained in full.
        batch_size: Samples per step.
        steps: Steps of a run.
        head_lr: Learning rate of the head.
        part: Number of samples of ``dev`` that judge a run while it trains.
        probe: What else is to be found out about the model at the end, as a part of the result.
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
    probe: Callable[[nn.Module], dict[str, float]] = lambda model: {}

    def batches(self, seed: int) -> Iterator[Batch]:
        """Full training batches of samples of similar length, without end; their order depends on the seed alone."""
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
        batches = [to_device(self.dev.batch(index.tolist()), device) for index in order.split(32)]
        logits = torch.cat([model(**batch).logits for batch in batches]).cpu()
        labels = torch.cat([batch["labels"] for batch in batches]).cpu()
        model.train()
        back = order.argsort()
        return logits[back], labels[back]

    def judge(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """The metrics and their mean, which is the score; a metric that is not defined counts as zero."""
        predicted = logits.squeeze(1) if self.num_classes == 1 else logits.argmax(1)
        metrics = make_metrics(self.metrics, self.num_classes)
        values = {name: metric(predicted, labels).nan_to_num().item() for name, metric in metrics.items()}
        return {"score": sum(values.values()) / len(values), **values}


def held_back(task: Task) -> Task:
    """The task with a tenth of its training samples, the last ones, in place of its held-out samples."""
    size = task.train.size * 9 // 10
    train, dev = (_some(task.train, range(*of_part)) for of_part in ((0, size), (size, task.train.size)))
    return replace(task, train=train, dev=dev)


def _some(samples: Samples, index: range) -> Samples:
    lengths = None if samples.lengths is None else [samples.lengths[i] for i in index]
    return Samples(len(index), lambda chosen: samples.batch([index[i] for i in chosen]), lengths)


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """The batch on a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}
