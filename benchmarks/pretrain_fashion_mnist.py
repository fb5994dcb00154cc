"""Pretrain the quickstart's ViT on Fashion-MNIST and write it in half precision.

The file that the project ships was made by

    python benchmarks/pretrain_fashion_mnist.py --output configs/weights/vit_fashion_mnist.safetensors

on two CPU cores. Fashion-MNIST comes from Debian's package ``dataset-fashion-mnist``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import lightning as L
import timm
import torch
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from geolora_pl.data.fashion_mnist import FashionMNIST

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {
    "img_size": 28,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": 64,
    "depth": 4,
    "num_heads": 4,
    "num_classes": 10,
    "pretrained_cfg_overlay": {"input_size": (1, 28, 28), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0},
}


class Pretraining(L.LightningModule):
    """A timm model trained in full with AdamW and one cosine of the learning rate."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.model = timm.create_model(ARCHITECTURE, **MODEL_ARGS)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    L.seed_everything(args.seed)
    module = Pretraining(args.lr)
    augment = {"hflip": 0.5, "scale": (0.8, 1.0), "color_jitter": None}
    data = FashionMNIST(batch_size=128, val_fraction=0.02, num_workers=1, augment=augment)
    trainer = L.Trainer(max_epochs=args.epochs, logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.fit(module, data)
    accuracy = trainer.validate(module, data.test_dataloader())[0]["val_accuracy"]

    args.output.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.half().contiguous() for name, weight in module.model.state_dict().items()}
    metadata = {
        "architecture": ARCHITECTURE,
        "model_args": json.dumps(MODEL_ARGS),
        "trained_on": f"Fashion-MNIST, {args.epochs} epochs, test accuracy {accuracy:.4f}",
    }
    save_file(weights, args.output, metadata)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.2f} MB, test accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
