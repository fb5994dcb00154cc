"""Read Fashion-MNIST from its IDX files: 70,000 grey images of 28 x 28 in ten classes of clothing."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from geolora_pl.data.images.base import ArrayImages, ImageDataModule
from geolora_pl.data.images.reader import Sample

_FOLDERS = (Path("data/fashion-mnist"), Path("/usr/share/datasets/fashion-mnist"))  # the second is Debian's
_PREFIX = {"train": "train", "test": "t10k"}


class FashionMNIST(ImageDataModule):
    """Fashion-MNIST (Xiao, Rasul and Vollgraf 2017) from a folder with the four IDX files, gzipped or not.

    Args:
        folder: The folder of the files; by default ``data/fashion-mnist``, then the folder of Debian's package
            ``dataset-fashion-mnist``.
        **kwargs: Arguments of :class:`ImageDataModule`.

    Raises:
        ValueError: A file is missing.
    """

    def __init__(self, folder: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        candidates = _FOLDERS if folder is None else (Path(folder),)
        found = [path for path in candidates if path.is_dir()]
        if not found:
            raise ValueError(
                f"folder={folder!r}: there is no folder {' or '.join(map(str, candidates))}; install Debian's package "
                "dataset-fashion-mnist, or name the folder that holds the four IDX files"
            )
        self.folder = found[0]

    @property
    def class_names(self) -> list[str]:
        """The ten kinds of clothing."""
        return ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]

    def load_splits(self) -> dict[str, Dataset[Sample]]:
        """Read the four files."""
        return {
            split: ArrayImages(
                read_idx(self.folder / f"{prefix}-images-idx3-ubyte"),
                read_idx(self.folder / f"{prefix}-labels-idx1-ubyte").tolist(),
            )
            for split, prefix in _PREFIX.items()
        }


def read_idx(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Read an IDX file of bytes, gzipped (``path.gz``) or not.

    Args:
        path: The file's path without ``.gz``.

    Returns:
        The array, in the shape that the file's header gives.

    Raises:
        ValueError: The file is missing or is not an IDX file of bytes.
    """
    if path.is_file():
        content = path.read_bytes()
    elif path.with_name(path.name + ".gz").is_file():
        try:
            content = gzip.decompress(path.with_name(path.name + ".gz").read_bytes())
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}.gz cannot be unpacked ({error}): fetch it again") from error
    else:
        raise ValueError(f"{path} is missing, with and without .gz")
    if len(content) < 4 or content[:3] != b"\0\0\x08":  # two zeros, then the code of unsigned bytes
        raise ValueError(f"{path} is not an IDX file of bytes: fetch it again")
    dimensions = content[3]
    if len(content) < 4 + 4 * dimensions:
        raise ValueError(f"{path} is cut short in its header: fetch it again")
    shape = np.frombuffer(content, ">i4", dimensions, offset=4)
    offset = 4 + 4 * dimensions
    if len(content) != offset + int(shape.prod()):
        raise ValueError(f"{path} is cut short: its header promises {int(shape.prod())} bytes of data; fetch it again")
    return np.frombuffer(content, np.uint8, offset=offset).reshape(shape)
