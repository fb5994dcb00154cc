"""A LightningModule that knows nothing of adapters, with its data and a quick trainer."""

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from geolora_pl import (
    AdapterConfig,
)

ADAPTER = AdapterConfig(init_rank=2, max_rank=5, target_modules=["body.0", "body.2"], modules_to_save=["head"])


def loader(batch_size=8, batches=6):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch_size * batches, 10, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=batch_size)


class Foreign(L.LightningModule):
    """A LightningModule that knows nothing of us."""

    def __init__(self, optimizer=torch.optim.AdamW):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh())
        self.head = nn.Linear(8, 2)
        self.make = optimizer

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.head(self.body(x)), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self.head(self.body(x)), y))

    test_step = validation_step

    def configure_optimizers(self):
        return self.make(self.parameters(), lr=1e-2)


def trainer(callback, *more, **settings):
    defaults = {
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in more),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "callbacks": [callback, *more],
    }
    return L.Trainer(**{**defaults, **settings})


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(list(loader().dataset))
