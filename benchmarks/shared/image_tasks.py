"""Three image tasks for the quickstart's small ViT, each with other images than it was pretrained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks.shared.paths import ROOT
from benchmarks.shared.pretrain_fashion_mnist import FashionClasses, pretrain
from benchmarks.shared.task import Batch, Samples, Task
from geolora_pl import AdapterConfig, inject_adapters
from geolora_pl.data import Digits, FashionMNIST, ImageDataModule
from geolora_pl.data.images.base import ArrayImages
from geolora_pl.data.images.reader import Sample
from geolora_pl.tasks import ImageClassification

WEIGHTS = ROOT / "geolora_pl" / "configs" / "vit_fashion_mnist.safetensors"
HELD_OUT_WEIGHTS = ROOT / "build" / "vit_held_out.safetensors"
PRETRAINED_ON = (1, 5, 7, 8, 9)  # trousers, shoes and bags
HELD_OUT = (0, 2, 3, 4, 6)  # tops, coats and dresses: the classes that are hard to tell apart


class RotatedFashionMNIST(FashionMNIST):
    """Fashion-MNIST, every image turned to the left by a quarter."""

    def load_splits(self) -> dict[str, Dataset[Sample]]:
        """Read the four files and turn the images."""
        turned: dict[str, Dataset[Sample]] = {}
        for split, samples in super().load_splits().items():
            assert isinstance(samples, ArrayImages)
            turned[split] = ArrayImages(np.rot90(samples.images, axes=(1, 2)).copy(), samples.labels)
        return turned


class WithLoss(nn.Module):
    """An image classifier that returns its loss and its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        logits = self.model(images)
        return SequenceClassifierOutput(loss=F.cross_entropy(logits, labels), logits=logits)


def load(name: str) -> Task:
    """An image task by name.

    ``digits`` is the quickstart: its ViT, pretrained on Fashion-MNIST, learns scikit-learn's digits in 16 epochs. In
    ``rotated`` the same ViT learns its ten classes again from 2,000 images that lie on their side, in 10 epochs. In
    ``held_out`` a ViT that was pretrained on five classes of Fashion-MNIST learns the other five from 2,000 images
    in 10 epochs; it is pretrained here when its weights are missing.
    """
    if name == "digits":
        return _task(name, Digits(), WEIGHTS, steps=304)
    if name == "rotated":
        return _task(name, RotatedFashionMNIST(), WEIGHTS, steps=310, train_size=2000)
    if not HELD_OUT_WEIGHTS.exists():
        pretrain(HELD_OUT_WEIGHTS, PRETRAINED_ON)
    return _task(name, FashionClasses(HELD_OUT), HELD_OUT_WEIGHTS, steps=310, train_size=2000)


def _task(name: str, data: ImageDataModule, weights: Path, steps: int, train_size: int | None = None) -> Task:
    arguments = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())["model"]["init_args"]
    settings = {key: arguments[key] for key in ("model_name", "model_args")}

    def make_model(seed: int) -> WithLoss:
        torch.manual_seed(seed)
        module = ImageClassification(**settings, checkpoint_path=str(weights), num_classes=data.num_classes)
        return WithLoss(module.build_model())

    model = make_model(0)
    transform = create_transform(**resolve_model_data_config(model.model), is_training=False)
    data.setup("fit")

    def samples(split: str, size: int | None) -> Samples:
        dataset = data.splits[split]
        shuffled = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:size].tolist()
        chosen = [dataset[i] for i in shuffled]
        images = torch.stack([transform(image.convert("L")) for image, _ in chosen])
        labels = torch.tensor([label for _, label in chosen])

        def batch(index: Sequence[int]) -> Batch:
            return {"images": images[index], "labels": labels[index]}

        return Samples(len(chosen), batch)

    heads = ["model.head"]
    return Task(
        name,
        make_model,
        samples("train", train_size),
        samples("test", None),
        data.num_classes,
        ["accuracy"],
        targets=list(inject_adapters(model, AdapterConfig(modules_to_save=heads))),
        heads=heads,
        batch_size=64,
        steps=steps,
        head_lr=arguments["head_lr"],
    )
