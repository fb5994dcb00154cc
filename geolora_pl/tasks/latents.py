"""Turn images into the latents of a VAE, each image once where it never changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL
from torch import Tensor

Moments = tuple[Tensor, Tensor]


class Latents:
    """Keeps the mean and the deviation of each image's latents in main memory; the sample is drawn anew every time.

    Images that are kept are encoded one by one, so that their latents do not depend on what else is in the batch: a
    resumed run encodes them in another order and gets the same bits.

    Args:
        keep: Whether any are kept.
    """

    def __init__(self, keep: bool = True) -> None:
        self.keep = keep
        self._kept: dict[tuple[str, int], Moments] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forget all images: others may have the same indices from now on."""
        self._kept.clear()

    @torch.no_grad()
    def moments(self, vae: AutoencoderKL, images: Tensor, split: str, indices: Sequence[int]) -> Moments:
        """Mean and deviation of the latents, scaled as the UNet takes them.

        Args:
            vae: In evaluation mode.
            images: (batch, 3, height, width) in [-1, 1].
            split: The images of different splits have the same indices.
            indices: The number of each image, or -1 for one that is not kept.

        Returns:
            Two tensors (batch, channels, height / factor, width / factor).
        """
        if not self.keep or max(indices) < 0:
            return _encode(vae, images)
        found = []
        for image, index in zip(images, indices, strict=True):
            moments = self._kept.get((split, index))
            if moments is None:
                moments = _encode(vae, image[None])
                if index >= 0:
                    moments = self._kept[split, index] = (moments[0].cpu(), moments[1].cpu())
            found.append(moments)
        mean, deviation = (torch.cat([moments[i].to(images.device) for moments in found]) for i in (0, 1))
        return mean, deviation


def _encode(vae: AutoencoderKL, images: Tensor) -> Moments:
    with torch.autocast(images.device.type, enabled=False):  # VAEs overflow in half precision
        distribution = vae.encode(images.to(vae.dtype)).latent_dist
    scale = vae.config.scaling_factor
    return distribution.mean * scale, distribution.std * scale
