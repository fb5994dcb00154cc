"""Pretrain the quickstart's ViT on Fashion-MNIST, or on some of its classes, and write its weights in half precision.

The file that the project ships was made by

    python benchmarks/shared/pretrain_fashion_mnist.py --output geolora_pl/configs/vit_fashion_mnist.safetensors

on two CPU cores. Fashion-MNIST comes from Debian's package ``dataset-fashion-mnist``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import timm
import torch
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import Dataset

from geolora_pl.data.images.base import ArrayImages, Sample
from geolora_pl.data.images.fashion_mnist import FashionMNIST

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {
    "img_size": 28,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": 64,
    "depth": 4,
    "num_heads": 4,
    "pretrained_cfg_overlay": {"input_size": (1, 28, 28), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0},
}


class FashionClasses(FashionMNIST):
    """Some classes of Fashion-MNIST, numbered from 0 in the order given.

    Args:
        classes: Indices of the classes, in [0, 10).
        **kwargs: Arguments of :class:`FashionMNIST`.
    """

    def __init__(self, classes: Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.classes = tuple(classes)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes that were chosen."""
        return [super(FashionClasses, self).class_names[label] for label in self.classes]

    def load_splits(self) -> dict[str, Dataset[Sample]]:
        """Read the four files and leave out the images of other classes."""
        splits = {}
        for split, samples in super().load_splits().items():
            assert isinstance(samples, ArrayImages)
            chosen = [i for i, label in enumerate(samples.labels) if label in self.classes]
            labels = [self.classes.index(samples.labels[i]) for i in chosen]
            splits[split] = ArrayImages(samples.images[chosen], labels)
        return splits


class Pretraining(L.LightningModule):
    """A timm model whose every weight is trained with AdamW and one cycle of the learning rate."""

    def __init__(self, num_classes: int, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.model = timm.create_model(ARCHITECTURE, num_classes=num_classes, **MODEL_ARGS)
        self.data_config = resolve_model_data_config(self.model)
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = self.loss(self.model(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        accuracy = (self.model(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("val_accuracy", accuracy, prog_bar=True)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.05)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def pretrain(
    output: Path, classes: Sequence[int] = range(10), epochs: int = 12, lr: float = 2e-3, seed: int = 0
) -> None:
    """Train the ViT and write its weights, with their accuracy, to a file.

    Args:
        output: A file that ends in ``.safetensors``.
        classes: Classes of Fashion-MNIST to train on.
        epochs: Number of epochs.
        lr: Largest learning rate of the schedule.
        seed: Seed.
    """
    L.seed_everything(seed)
    augment = {"hflip": 0.5, "scale": (0.8, 1.0), "color_jitter": None}
    data = FashionClasses(classes, batch_size=128, val_fraction=0.02, num_workers=1, augment=augment)
    module = Pretraining(data.num_classes, lr)
    trainer = L.Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.fit(module, data)
    accuracy = trainer.validate(module, data.test_dataloader())[0]["val_accuracy"]

    output.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.half().contiguous() for name, weight in module.model.state_dict().items()}
    metadata = {
        "architecture": ARCHITECTURE,
        "model_args": json.dumps({"num_classes": data.num_classes, **MODEL_ARGS}),
        "trained_on": f"{', '.join(data.class_names)} of Fashion-MNIST, {epochs} epochs, test accuracy {accuracy:.4f}",
    }
    save_file(weights, output, metadata)
    print(f"{output}: {output.stat().st_size / 1e6:.2f} MB, test accuracy {accuracy:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--classes", type=int, nargs="+", default=range(10), choices=range(10), metavar="0..9")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pretrain(args.output, args.classes, args.epochs, args.lr, args.seed)


if __name__ == "__main__":
    main()
