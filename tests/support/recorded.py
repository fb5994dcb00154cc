"""A module that records its batches."""

import random

import numpy as np
import torch
from foreign import Foreign
from torch import nn
from torch.utils.data import DataLoader, Dataset

BATCHES = 6


class Noisy(Dataset):
    """Samples with noise on them, as augmentation is, from all three generators of random numbers."""

    def __init__(self, size):
        self.x = torch.randn(size, 10, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        noise = torch.rand(()) + random.random() + float(np.random.rand())  # noqa: NPY002
        return self.x[index] + 0.1 * noise, int(self.x[index, 0] > 0)


class Recorded(Foreign):
    """A foreign module with dropout, whose data loader draws random numbers too; keeps its losses."""

    def __init__(self, workers=0, validated=True):
        super().__init__()
        self.body.append(nn.Dropout(0.2))
        self.workers, self.validated = workers, validated
        self.losses = {}

    def train_dataloader(self):
        return DataLoader(Noisy(8 * BATCHES), 8, shuffle=True, num_workers=self.workers)

    def val_dataloader(self):
        return DataLoader(Noisy(16), 8, shuffle=True) if self.validated else []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses[self.trainer.current_epoch, batch_idx] = loss.item()
        return loss
