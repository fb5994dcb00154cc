"""Read images to predict from one folder."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from geolora_pl.data.images.base import ImageDataModule, Sample


class UnlabelledImages(ImageDataModule):
    """The images of a folder, in the order of their names, for ``predict`` alone.

    Args:
        folder: The folder; folders inside it are left out, and so are files without the ending of an image.
        batch_size: Images per step and process, at least 1.
        num_workers: Number of loader processes, as for :class:`ImageDataModule`.

    Raises:
        ValueError: The folder does not exist, or holds no image.
    """

    def __init__(self, folder: str, batch_size: int = 64, num_workers: int | None = None) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers)
        if not Path(folder).is_dir():
            raise ValueError(f"folder={folder!r} is not a folder (from {Path.cwd()})")
        self.files = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in IMG_EXTENSIONS)
        if not self.files:
            raise ValueError(f"folder={folder!r} holds no image: the endings of images are {', '.join(IMG_EXTENSIONS)}")

    @property
    def class_names(self) -> list[str]:
        """An empty list, because only the model knows the classes."""
        return []

    @property
    def predict_inputs(self) -> dict[str, list[str]]:
        """The names of the files, to write beside the predictions."""
        return {"file": [path.name for path in self.files]}

    def load_splits(self) -> dict[str, Dataset[Sample]]:
        """List the images, each with the label -1."""
        return {"predict": _Files(self.files)}


class _Files(Dataset[Sample]):
    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        path = self.files[index]
        try:
            with Image.open(path) as image:
                image.load()
                return image, -1
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{path} cannot be read as an image: fix or remove it ({error})") from error
