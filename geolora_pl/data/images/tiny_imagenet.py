"""Read Tiny-ImageNet: 110,000 labelled colour images of 64 x 64 in 200 classes of ImageNet."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from geolora_pl.data.images.base import ImageDataModule
from geolora_pl.data.images.reader import FileImages, Sample, list_images

_NEEDED = ("wnids.txt", "words.txt", "train", "val/val_annotations.txt", "val/images")


class TinyImageNet(ImageDataModule):
    """Tiny-ImageNet (Stanford CS231n) from its folder, as ``tiny-imagenet-200.zip`` unpacks.

    The official test images have no labels. So the official validation images are the test split, as in papers,
    and ``val_fraction`` of the training images is held out for validation.

    Args:
        folder: The folder with ``wnids.txt``, ``words.txt``, ``train`` and ``val`` in it.
        **kwargs: Arguments of :class:`ImageDataModule`.

    Raises:
        ValueError: A file is missing or does not fit the others.
    """

    def __init__(self, folder: str = "data/tiny-imagenet-200", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.folder = Path(folder)
        if missing := [name for name in _NEEDED if not (self.folder / name).exists()]:
            raise ValueError(
                f"folder={folder!r} has no {', '.join(missing)}: unpack tiny-imagenet-200.zip "
                "(http://cs231n.stanford.edu/tiny-imagenet-200.zip), and name the folder that holds wnids.txt"
            )
        self._wnids = (self.folder / "wnids.txt").read_text().split()

    @property
    def num_classes(self) -> int:
        """Number of classes: 200 in the official files."""
        return len(self._wnids)

    @cached_property
    def class_names(self) -> list[str]:
        """The names in ``words.txt`` of the WordNet ids, in the order of ``wnids.txt``."""
        lines = (self.folder / "words.txt").read_text().splitlines()
        words = dict(line.split("\t", 1) for line in lines if line)
        return [words.get(wnid, wnid) for wnid in self._wnids]

    def load_splits(self) -> dict[str, Dataset[Sample]]:
        """List the images of ``train``, and those of ``val`` as the test split."""
        return {"train": self._train(), "test": self._test()}

    def _train(self) -> FileImages:
        paths: list[Path] = []
        labels: list[int] = []
        for label, wnid in enumerate(self._wnids):
            folder = self.folder / "train" / wnid / "images"
            of_class = list_images(folder, recursive=False)[0] if folder.is_dir() else []
            if not of_class:
                raise ValueError(f"{folder} has no image: unpack the archive again")
            paths += of_class
            labels += [label] * len(of_class)
        return FileImages(paths, labels)

    def _test(self) -> FileImages:
        annotations = self.folder / "val" / "val_annotations.txt"
        rows = [line.split("\t") for line in annotations.read_text().splitlines() if line]
        index = {wnid: label for label, wnid in enumerate(self._wnids)}
        paths = [self.folder / "val" / "images" / row[0] for row in rows]
        for path, row in zip(paths, rows, strict=True):
            if len(row) < 2 or row[1] not in index:
                raise ValueError(f"{annotations} gives {path.name} no class of wnids.txt: unpack the archive again")
            if not path.is_file():
                raise ValueError(f"{path} is missing and {annotations} names it: unpack the archive again")
        return FileImages(paths, [index[row[1]] for row in rows])
