"""Define the base of the sources of images with prompts: crops of one size, held-out images, loaders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from geolora_pl.data.images.reader import endings, list_images, note_conversions, note_left_out, plain, read_image
from geolora_pl.data.settings import check_batches, settle_num_workers
from geolora_pl.notes import keep_notes, note

Crop = Literal["center", "random"]
Batch = dict[str, Any]


@dataclass(frozen=True)
class Picture:
    """An image file with its prompt.

    Attributes:
        path: The file.
        prompt: What the image shows, in words.
        is_prior: Whether it shows the class and not the subject, for prior preservation.
    """

    path: Path
    prompt: str
    is_prior: bool = False


class PromptedImages(L.LightningDataModule):
    """The base of the sources of images with prompts: a subclass lists its pictures.

    A batch has ``images`` (batch, 3, size, size) in [-1, 1], their ``prompts``, ``is_prior`` (batch,), ``indices``
    (batch,), by which an image that never changes is known again (else -1), and ``geometry`` (batch, 6): the height and
    width of the file, the top and left of the crop, and the height and width of what is left. Images are turned upright
    and made opaque, and their shorter side is scaled to the size that the trained module offers as ``image_size``.

    Args:
        batch_size: Images per step and process, at least 1; class images for prior preservation come on top.
        val_folder: Images that are held out, in the same form; by default a part of the others is.
        val_fraction: The share of the images that is held out without ``val_folder``, in (0, 1); one at least.
        crop: What is kept of the longer side: its middle (``center``), or another part each time (``random``).
        flip: The probability that an image is mirrored in training, in [0, 1].
        seed: Seed of the choice of held-out images.
        num_workers: Number of loader processes, as for :class:`ImageDataModule`.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        batch_size: int = 1,
        val_folder: str | None = None,
        val_fraction: float = 0.1,
        crop: Crop = "center",
        flip: float = 0.0,
        seed: int = 0,
        num_workers: int | None = None,
    ) -> None:
        super().__init__()
        if crop not in get_args(Crop):
            raise ValueError(f"crop={crop!r} must be one of {', '.join(get_args(Crop))}")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip={flip!r} must lie in [0, 1]: it is a probability")
        check_batches(batch_size, val_fraction)
        self.num_workers = settle_num_workers(num_workers)
        self.batch_size = batch_size
        self.val_folder = val_folder
        self.val_fraction = val_fraction
        self.crop: Crop = crop
        self.flip = flip
        self.seed = seed
        self.splits: dict[str, list[Picture]] = {}
        self.notes: list[str] = []  # what the user is told about the data

    def pictures_in(self, folder: str, argument: str) -> list[Picture]:
        """List the pictures of a folder.

        Args:
            folder: The folder.
            argument: The name of the argument that names it, for messages.

        Raises:
            ValueError: The folder holds none, or something in it is wrong.
        """
        raise NotImplementedError(f"{type(self).__name__} must list its pictures")

    @property
    def folder_of_training(self) -> str:
        """The folder of the training images."""
        raise NotImplementedError(f"{type(self).__name__} must name its folder")

    @property
    def prompts(self) -> list[str]:
        """Every prompt that the images have, each once."""
        return list(dict.fromkeys(picture.prompt for split in self.splits.values() for picture in split))

    def prior_of_training(self) -> list[Picture]:
        """The class images for prior preservation; by default there are none."""
        return []

    def setup(self, stage: str) -> None:
        """List the images once, and hold some out if there is no folder of such."""
        if self.splits:
            return
        with keep_notes(self.notes):
            pictures = self.pictures_in(self.folder_of_training, "folder")
            if self.val_folder is not None:
                self.splits = {"train": pictures, "val": self.pictures_in(self.val_folder, "val_folder")}
                return
            count = max(1, round(self.val_fraction * len(pictures)))
            if count == len(pictures):
                raise ValueError(
                    f"folder={self.folder_of_training!r} has {count} image, which cannot be both trained on and held "
                    "out: add images, or name a val_folder"
                )
            order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(self.seed)).tolist()
            chosen = set(order[:count])
            self.splits = {
                split: [picture for i, picture in enumerate(pictures) if (i in chosen) == held_out]
                for split, held_out in (("train", False), ("val", True))
            }
            note(f"{count} of {len(pictures)} images are held out for validation (val_fraction={self.val_fraction})")

    def _size(self) -> int:
        module = self.trainer.lightning_module if self.trainer is not None else None
        size = getattr(module, "image_size", None)
        if not isinstance(size, int):
            raise ValueError(
                f"{type(module).__name__} has no image_size, which these images are cropped to: give it one"
            )
        return size

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled training images, each with a class image if there are any."""
        is_fixed = self.flip == 0 and self.crop == "center"
        return DataLoader(
            _Crops(self.splits["train"], self._size(), self.crop, self.flip, self.prior_of_training()),
            batch_size=self.batch_size,
            shuffle=True,
            num_workers=self.num_workers,
            collate_fn=_together,
            # What workers draw must not depend on earlier epochs, which a resumed run has not seen.
            persistent_workers=self.num_workers > 0 and is_fixed,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the held-out images."""
        return DataLoader(
            _Crops(self.splits["val"], self._size()),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=_together,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


class _Crops(Dataset[list[Batch]]):
    """Pictures as tensors, each beside a class image where there are such; the fewer are repeated."""

    def __init__(
        self,
        pictures: Sequence[Picture],
        size: int,
        crop: Crop = "center",
        flip: float = 0.0,
        prior: Sequence[Picture] = (),
    ) -> None:
        self.groups = [group for group in (pictures, prior) if group]
        self.size, self.crop, self.flip = size, crop, flip

    def __len__(self) -> int:
        return max(map(len, self.groups))

    def __getitem__(self, index: int) -> list[Batch]:
        first = 0
        found = []
        for group in self.groups:
            place = index % len(group)
            found.append(self._read(group[place], first + place))
            first += len(group)
        return found

    def _read(self, picture: Picture, index: int) -> Batch:
        image = plain(read_image(picture.path), "RGB")
        width, height = image.size
        resized = F.resize(image, self.size, InterpolationMode.LANCZOS)
        spare_x, spare_y = (side - self.size for side in resized.size)
        if self.crop == "random":
            left, top = (int(torch.randint(spare + 1, ())) for spare in (spare_x, spare_y))
        else:
            left, top = spare_x // 2, spare_y // 2
        cropped = F.crop(resized, top, left, self.size, self.size)
        if self.flip and float(torch.rand(())) < self.flip:
            cropped, left = F.hflip(cropped), spare_x - left  # the place in the mirrored image
        is_fixed = self.flip == 0 and (self.crop == "center" or spare_x == spare_y == 0)
        return {
            "images": F.to_tensor(cropped) * 2 - 1,
            "prompts": picture.prompt,
            "is_prior": picture.is_prior,
            "indices": index if is_fixed else -1,
            "geometry": torch.tensor([height, width, top, left, self.size, self.size]),
        }


def _together(samples: Sequence[list[Batch]]) -> Batch:
    """A batch: the images first, and then the class images."""
    rows = [row for group in zip(*samples, strict=True) for row in group]
    batch: Batch = {name: [row[name] for row in rows] for name in rows[0]}
    stacked: dict[str, Tensor] = {name: torch.stack(batch[name]) for name in ("images", "geometry")}
    return batch | stacked | {"is_prior": torch.tensor(batch["is_prior"]), "indices": batch["indices"]}


def images_in(folder: str, argument: str) -> list[Path]:
    """The image files of a folder, after a look at their headers.

    Args:
        folder: The folder; what else is in it is left out, which a message says.
        argument: The name of the argument that names it, for messages.

    Raises:
        ValueError: It is no folder, holds no image, or one that cannot be read.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{argument}={folder!r} is not a folder (from {Path.cwd()})")
    images, left_out = list_images(Path(folder), recursive=False)
    if not images:
        raise ValueError(f"{argument}={folder!r} holds no image: the endings of images are {', '.join(endings())}")
    note_left_out(folder, [path for path in left_out if path.suffix not in (".txt", ".jsonl")])
    note_conversions(folder, images)
    return images
