"""Read your own images from one folder per class, inside one folder per split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset
from torchvision import datasets

from geolora_pl.data.images.base import ImageDataModule, Sample


class ImageFolder(ImageDataModule):
    """A tree ``folder/split/class/image``, with the splits ``train`` and, if you have them, ``val`` and ``test``.

    Args:
        folder: The folder with ``train`` in it. Without ``val``, a part of ``train`` is held out.
        **kwargs: Arguments of :class:`ImageDataModule`.

    Raises:
        ValueError: A folder is missing or empty, or a split has other classes than ``train``.
    """

    def __init__(self, folder: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.folder = Path(folder)
        if not (self.folder / "train").is_dir():
            raise ValueError(f"folder={folder!r} must hold a folder 'train' with one folder of images per class")
        self._classes = _class_folders(self.folder / "train")
        if not self._classes:
            raise ValueError(f"{self.folder / 'train'} is empty: it must hold one folder of images per class")
        for split in self._others():
            if (classes := _class_folders(self.folder / split)) != self._classes:
                differ = ", ".join(sorted(set(classes) ^ set(self._classes)))
                raise ValueError(f"{self.folder / split} and train have different classes: {differ}")

    def _others(self) -> list[str]:
        return [split for split in ("val", "test") if (self.folder / split).is_dir()]

    @property
    def class_names(self) -> list[str]:
        """The names of the class folders, sorted."""
        return self._classes

    def load_splits(self) -> dict[str, Dataset[Sample]]:
        """List the images of every split."""
        splits: dict[str, Dataset[Sample]] = {}
        for split in ("train", *self._others()):
            try:
                splits[split] = datasets.ImageFolder(str(self.folder / split), loader=_read_image)
            except FileNotFoundError as error:  # a class without an image
                raise ValueError(f"{self.folder / split}: {error}") from error
        return splits


def _class_folders(path: Path) -> list[str]:
    try:
        return sorted(child.name for child in path.iterdir() if child.is_dir())
    except PermissionError as error:
        raise ValueError(f"{path} cannot be read: give yourself the permission to list it") from error


def _read_image(path: str) -> Image.Image:
    try:
        image = Image.open(path)
        with image:  # the file is closed at the end
            image.load()
    except (OSError, SyntaxError) as error:  # Pillow raises these for a file that is not an image or is cut short
        raise ValueError(f"{path} cannot be read as an image: remove or replace it") from error
    return image
