"""Read images to predict from one folder."""

from __future__ import annotations

from pathlib import Path

from torch.utils.data import Dataset

from geolora_pl.data.images.base import ImageDataModule
from geolora_pl.data.images.reader import FileImages, Sample, endings, list_images, note_conversions, note_left_out


class UnlabelledImages(ImageDataModule):
    """The images of a folder, in the order of their names, for ``predict`` alone.

    Args:
        folder: The folder; folders inside it and files that are not images are left out, and a message says how many
            there are.
        batch_size: Images per step and process, at least 1.
        num_workers: Number of loader processes, as for :class:`ImageDataModule`.

    Raises:
        ValueError: The folder does not exist, or holds no image.
    """

    def __init__(self, folder: str, batch_size: int = 64, num_workers: int | None = None) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers)
        if not Path(folder).is_dir():
            raise ValueError(f"folder={folder!r} is not a folder (from {Path.cwd()})")
        self.folder = Path(folder)
        self.files, self._left_out = list_images(self.folder, recursive=False)
        if not self.files:
            raise ValueError(f"folder={folder!r} holds no image: the endings of images are {', '.join(endings())}")

    @property
    def class_names(self) -> list[str]:
        """An empty list, because only the model knows the classes."""
        return []

    @property
    def multi_label(self) -> None:
        """``None``, because only the model knows whether an image has several labels."""
        return None

    @property
    def predict_inputs(self) -> dict[str, list[str]]:
        """The names of the files, to write beside the predictions."""
        return {"file": [path.name for path in self.files]}

    def load_splits(self) -> dict[str, Dataset[Sample]]:
        """List the images, each with the label -1, and look at their headers."""
        note_left_out(self.folder, self._left_out)
        note_conversions(self.folder, self.files)
        return {"predict": FileImages(self.files, [-1] * len(self.files))}
