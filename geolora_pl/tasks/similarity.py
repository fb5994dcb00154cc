"""How much generated images resemble those of the subject, by the features of a timm model."""

from __future__ import annotations

from collections.abc import Sequence

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from geolora_pl.errors import in_one_line


class Similarity(nn.Module):
    """The mean cosine of the features of generated and real images, over all pairs.

    With a DINO model this is the metric "DINO" of the DreamBooth paper (arXiv 2208.12242).

    Args:
        model_name: A name that ``timm.create_model`` knows, such as ``vit_small_patch14_dinov2.lvd142m``, or
            ``local-dir:folder`` for a folder that timm wrote.

    Raises:
        ValueError: The model is not there.
    """

    def __init__(self, model_name: str) -> None:
        super().__init__()
        try:
            self.model = timm.create_model(model_name, pretrained=True, num_classes=0)
        except Exception as error:  # of timm for its name, of the hub for its weights, of the file
            raise ValueError(
                f"similarity_model={model_name!r} cannot be loaded: {in_one_line(error)[:300]}; check the "
                "connection, name a folder of timm as local-dir:folder, or leave it out"
            ) from error
        self.model.requires_grad_(False).eval()
        self.transform = create_transform(**resolve_model_data_config(self.model), is_training=False)

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """Return features of length 1 (images, dimension)."""
        device = next(self.model.parameters()).device
        batch = torch.stack([self.transform(image.convert("RGB")) for image in images]).to(device)
        return nn.functional.normalize(self.model(batch).float(), dim=-1)

    def forward(self, images: Sequence[Image.Image], real: Sequence[Image.Image]) -> Tensor:
        """Return the mean cosine, in [-1, 1]."""
        return (self.features(images) @ self.features(real).mT).mean()
