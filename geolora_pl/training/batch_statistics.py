"""Take back what a batch has done to the running statistics of a model, where its optimizer step is skipped."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from geolora_pl.adapters.statistics import running_statistics


class BatchStatistics:
    """The running statistics of a model as they were after the last step that was taken.

    Args:
        model: The model; one without such statistics costs nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        # Found once, for a walk over all modules in every step would cost more than the copies.
        self._modules = [module for module in model.modules() if running_statistics(module, recurse=False)]
        self._kept: list[Tensor] = []
        self.keep()

    def _now(self) -> list[Tensor]:
        return [buffer for module in self._modules for buffer in running_statistics(module, recurse=False).values()]

    @torch.no_grad()
    def keep(self) -> None:
        """Keep the statistics as they are now."""
        self._kept = [buffer.clone() for buffer in self._now()]

    @torch.no_grad()
    def take_back_if(self, skipped: Tensor | bool) -> None:
        """Put the kept statistics back if a step is skipped, and keep those of now otherwise.

        Args:
            skipped: A truth value, or a tensor (), 0 or 1, so that the host need not wait for its device.
        """
        for buffer, kept in zip(self._now(), self._kept, strict=True):
            flag = torch.as_tensor(skipped, device=buffer.device) > 0
            buffer.copy_(torch.where(flag, kept.to(buffer), buffer))
        self.keep()
