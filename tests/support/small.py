"""A small GeoLoRAModule."""

import torch
from torch import nn

from geolora_pl import GeoLoRAModule


class Small(GeoLoRAModule):
    def __init__(self, width: int = 12, **kwargs):
        super().__init__(**kwargs)
        self.width = width

    def build_model(self):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(10, self.width), nn.Tanh(), nn.Linear(self.width, 8), nn.LayerNorm(8), nn.Linear(8, 2)
        )

    def new_modules(self):
        return ["4"]

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.model(batch[0]), batch[1]))

    test_step = validation_step
