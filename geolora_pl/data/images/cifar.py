"""Read CIFAR-10 and CIFAR-100, 60,000 colour images of 32 x 32 each, by torchvision, which can download them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from torch.utils.data import Dataset
from torchvision import datasets

from geolora_pl.data.images.base import ArrayImages, ImageDataModule
from geolora_pl.data.images.reader import Sample


class CIFAR10(ImageDataModule):
    """CIFAR-10 (Krizhevsky 2009) from a folder; ``download`` fetches it into the folder.

    Args:
        folder: The folder with the extracted ``cifar-10-batches-py``.
        download: Whether to fetch the files when they are missing.
        **kwargs: Arguments of :class:`ImageDataModule`.

    Raises:
        ValueError: The files are missing and ``download`` is off.
    """

    _source: ClassVar[type[datasets.CIFAR10]] = datasets.CIFAR10

    def __init__(self, folder: str = "data/cifar", download: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not download and not (Path(folder) / self._source.base_folder).is_dir():
            raise ValueError(
                f"folder={folder!r}: there is no {Path(folder) / self._source.base_folder}; set download to true to "
                "fetch it, or name the folder that holds it"
            )
        self.folder = folder
        self.download = download

    def prepare_data(self) -> None:
        """Fetch the files; Lightning calls this in one process only."""
        if self.download:
            self._source(self.folder, download=True)

    @property
    def num_classes(self) -> int:
        """Number of classes, known before the files are there."""
        return 10

    @property
    def class_names(self) -> list[str]:
        """The names of the classes in the files."""
        return list(self._open().classes)

    def _open(self, train: bool = True) -> datasets.CIFAR10:
        try:
            return self._source(self.folder, train=train)
        except RuntimeError as error:  # a checksum differs
            raise ValueError(
                f"folder={self.folder!r}: a file in {self._source.base_folder} is missing or broken; set download to "
                "true to fetch it again"
            ) from error

    def load_splits(self) -> dict[str, Dataset[Sample]]:
        """Read the files."""
        sources = {split: self._open(train=split == "train") for split in ("train", "test")}
        return {split: ArrayImages(source.data, source.targets) for split, source in sources.items()}


class CIFAR100(CIFAR10):
    """CIFAR-100 (Krizhevsky 2009) from a folder with ``cifar-100-python``, with the arguments of :class:`CIFAR10`."""

    _source = datasets.CIFAR100

    @property
    def num_classes(self) -> int:
        """Number of classes, known before the files are there."""
        return 100
