"""Read your own images from one folder per class, inside one folder per split."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from geolora_pl.data.images.base import ImageDataModule
from geolora_pl.data.images.reader import (
    FileImages,
    Sample,
    endings,
    is_hidden,
    list_images,
    note_conversions,
    note_left_out,
)
from geolora_pl.data.settings import find_splits


class ImageFolder(ImageDataModule):
    """A tree ``folder/split/class/image``, with the splits ``train`` and, if you have them, ``val`` and ``test``.

    The folder ``val`` may also be called ``valid``, ``validation`` or ``dev``. Images in folders inside a class folder
    belong to the class. Hidden files and folders, files of other kinds and folders beside the splits are left out; a
    message says how many there are, and another how many images are converted.

    Args:
        folder: The folder with ``train`` in it. Without ``val``, a part of ``train`` is held out.
        **kwargs: Arguments of :class:`ImageDataModule`.

    Raises:
        ValueError: A folder is missing or empty or there twice, or a split has other classes than ``train``.
    """

    def __init__(self, folder: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.folder = Path(folder)
        inside = _children(self.folder) if self.folder.is_dir() else []
        names = find_splits([path.name for path in inside if path.is_dir() and not is_hidden(path)], self.folder)
        if "train" not in names:
            raise ValueError(f"folder={folder!r} must hold a folder 'train' with one folder of images per class")
        self._splits = {split: self.folder / name for split, name in names.items()}
        self._left_out = [path for path in inside if path not in self._splits.values()]
        self._classes = list(_class_folders(self._splits["train"]))
        if not self._classes:
            raise ValueError(f"{self._splits['train']} is empty: it must hold one folder of images per class")
        for path in self._splits.values():
            if (classes := list(_class_folders(path))) != self._classes:
                differ = ", ".join(sorted(set(classes) ^ set(self._classes)))
                raise ValueError(f"{path} and {self._splits['train'].name} have different classes: {differ}")

    @property
    def class_names(self) -> list[str]:
        """The names of the class folders, sorted."""
        return self._classes

    def load_splits(self) -> dict[str, Dataset[Sample]]:
        """List the images of every split, and look at their headers."""
        left_out = list(self._left_out)
        splits: dict[str, Dataset[Sample]] = {}
        everything: list[Path] = []
        for split, folder in self._splits.items():
            of_class = _class_folders(folder)
            left_out += [path for path in _children(folder) if path not in of_class.values()]
            paths: list[Path] = []
            labels: list[int] = []
            for label, path in enumerate(of_class.values()):
                images, others = list_images(path, recursive=True)
                if not images:
                    raise ValueError(f"{path} holds no image: remove the folder; images end in {', '.join(endings())}")
                paths += images
                labels += [label] * len(images)
                left_out += others
            splits[split] = FileImages(paths, labels)
            everything += paths
        note_left_out(self.folder, left_out)
        note_conversions(self.folder, everything)
        return splits


def _class_folders(path: Path) -> dict[str, Path]:
    """The folders of the classes by the names of the classes, sorted by name.

    A name may be stored with composed characters or, as on a Mac, with decomposed ones, and is the same to people.
    """
    folders: dict[str, Path] = {}
    for child in _children(path):
        name = unicodedata.normalize("NFC", child.name)
        if not child.is_dir() or is_hidden(child):
            continue
        if name in folders:
            raise ValueError(f"{path} has two folders that read {name!r}: their names differ in bytes only; join them")
        folders[name] = child
    return dict(sorted(folders.items()))


def _children(path: Path) -> list[Path]:
    try:
        return sorted(path.iterdir())
    except PermissionError as error:
        raise ValueError(f"{path} cannot be read: give yourself the permission to list it") from error
