"""Find and read image files in one way, for training, validation, test and prediction alike."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from geolora_pl.lfs import refuse_pointer
from geolora_pl.notes import note

Label = int | Tensor  # a class index, or a number or 0 and 1 for each of several labels, as float32
Sample = tuple[Image.Image, Label]

GROUND = "white"  # what shows through transparent pixels, as in a browser
# Pillow knows more formats, but some of them start other programs or hold no pixels.
_FORMATS = {"AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"}
_GREY = {"1", "L", "LA", "La", "I", "F"}
_DEEP = "have more than 8 bits per channel (0 to 65535 becomes 0 to 255)"
_LOOKED_AT = 32  # images whose values are read to see how many of the 16 bits are used
_DARK = 2**14  # a value that images of 10, 12 or 14 bits never have
_PLAIN = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX"}  # 8 bits per channel at most, grey or RGB


class FileImages(Dataset[Sample]):
    """Image files that are read only when they are needed.

    Args:
        paths: (n,) image files.
        labels: (n,) class indices, -1 where the class is not known; or numbers (n,), or 0 and 1 for each of several
            labels (n, labels), as float32.
    """

    def __init__(self, paths: Sequence[Path], labels: Sequence[int] | Tensor) -> None:
        self.paths = paths
        self.labels = labels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        return read_image(self.paths[index]), self.labels[index]


def read_image(path: Path) -> Image.Image:
    """Read the first frame of an image file, as :func:`plain` returns it.

    Raises:
        ValueError: The file cannot be read; the message names it.
    """
    with _opened(path) as image:
        image.load()
        return plain(image)


def plain(image: Image.Image, mode: str | None = None) -> Image.Image:
    """Return an image upright, opaque and with 8 bits per channel.

    Integers of more than 8 bits are scaled from 0..65535 to 0..255, and floats from 0..1. Transparent pixels are laid
    over white. The image is turned as its EXIF orientation says.

    Args:
        image: Any image of Pillow.
        mode: ``L`` for grey or ``RGB`` for colour; by default ``L`` for an image without colours.

    Raises:
        ValueError: The values of an image of more than 8 bits lie outside of their range.

    Example:
        >>> plain(Image.fromarray(np.array([[0, 32896, 65535]], np.uint16))).tobytes().hex()
        '0080ff'
    """
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    grey = image.mode in _GREY or image.mode.startswith("I;")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, GROUND), over)
    elif grey and image.mode not in _PLAIN:
        image = _in_eight_bits(image)
    wanted = mode or ("L" if grey else "RGB")
    return image if image.mode == wanted else image.convert(wanted)


def _in_eight_bits(image: Image.Image) -> Image.Image:
    highest = 1.0 if image.mode == "F" else 65535.0
    values = np.asarray(image).astype(np.float64)
    if not (values.min() >= 0 and values.max() <= highest):  # also if a value is not a number
        raise ValueError(
            f"its values lie between {values.min():g} and {values.max():g}, but integers of more than 8 bits must lie "
            "between 0 and 65535 and floats between 0 and 1: scale them"
        )
    return Image.fromarray((values * (255 / highest)).round().astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    # A PNG's own getexif would read all pixels to look for EXIF data behind them.
    return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)  # type: ignore[no-any-return]


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    refuse_pointer(path)
    try:
        with Image.open(path, formats=sorted(_readable())) as image:
            yield image
    except Exception as error:  # every format raises its own errors
        raise ValueError(f"{path} cannot be read as an image: {error}; fix, replace or remove the file") from error


@cache
def _readable() -> set[str]:
    """The formats that this installation of Pillow reads: the first version with AVIF is 11.3."""
    Image.init()
    return _FORMATS & Image.OPEN.keys()


@cache
def endings() -> tuple[str, ...]:
    """Return the endings of the names of image files, in lower case."""
    return tuple(ending for ending, kind in Image.registered_extensions().items() if kind in _readable())


def is_hidden(path: Path) -> bool:
    """Whether a file or folder is there for a program and not for people, such as ``.ipynb_checkpoints``."""
    return path.name.startswith(".") or path.name == "__MACOSX"


def list_images(folder: Path, recursive: bool) -> tuple[list[Path], list[Path]]:
    """List the image files of a folder, sorted by folder and name, and what is left out.

    Args:
        folder: The folder.
        recursive: Whether the folders inside it are searched, too, but for the hidden ones.

    Returns:
        The image files, and the other files and folders.

    Raises:
        ValueError: A folder may not be read.
    """
    images: list[Path] = []
    left_out: list[Path] = []
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, onerror=_refuse_unreadable, followlinks=True):
        seen.add(os.path.realpath(root))
        for name in sorted(folders):
            inner = Path(root, name)
            if not recursive or is_hidden(inner) or os.path.realpath(inner) in seen:  # a link may form a circle
                folders.remove(name)
                left_out.append(inner)
        folders.sort()
        for path in (Path(root, name) for name in sorted(files)):
            is_image = path.suffix.lower() in endings() and not is_hidden(path) and path.is_file()
            (images if is_image else left_out).append(path)
    return images, left_out


def _refuse_unreadable(error: OSError) -> NoReturn:
    raise ValueError(f"{error.filename} cannot be listed ({error.strerror}): give yourself the permission") from error


def note_left_out(source: object, left_out: Iterable[Path]) -> None:
    """Say how many files and folders are left out, of which kinds, and name the first of each kind."""
    kinds: dict[str, list[str]] = {}
    for path in left_out:
        kind = "hidden" if is_hidden(path) else "folder" if path.is_dir() else path.suffix or "without an ending"
        kinds.setdefault(kind, []).append(path.name)
    if kinds:
        counts = ", ".join(f"{len(names)} {kind} ({_few(names)})" for kind, names in sorted(kinds.items()))
        note(f"{source}: left out: {counts}")


def _few(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and so on"


def note_conversions(source: object, paths: Sequence[Path]) -> None:
    """Look at the header of every image, and say how many are converted and how.

    Raises:
        ValueError: An image cannot be read; the message names the first one and says how many there are.
    """
    counts: Counter[str] = Counter()
    broken: list[ValueError] = []
    deep: list[Path] = []
    for path in paths:
        try:
            found = list(_conversions(path))
            counts.update(found)
            deep += [path] if _DEEP in found else []
        except ValueError as error:
            broken.append(error)
    if broken:
        more = f" (and {len(broken) - 1} more like it)" if broken[1:] else ""
        raise ValueError(f"{broken[0]}{more}") from broken[0]
    if counts:
        said = ", ".join(f"{count} {how}" for how, count in sorted(counts.items()))
        note(f"{source}: of {len(paths)} images {said}")
    if deep and 0 < (highest := max(map(_highest, deep[:_LOOKED_AT]))) < _DARK:
        note(
            f"{source}: no value of the images of more than 8 bits is above {highest}, as where 12 bits are stored in "
            f"16, so that they become almost black: multiply them by {65535 // highest} first"
        )


def _highest(path: Path) -> int:
    with _opened(path) as image:
        return int(np.asarray(image).max())


def _conversions(path: Path) -> Iterator[str]:
    with _opened(path) as image:
        if _orientation(image) != 1:
            yield "are turned upright (EXIF orientation)"
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # which holds a preview beside the picture
            yield "have several frames (the first is used)"
        if image.has_transparency_data:
            yield f"have transparency (laid over {GROUND})"
        if image.mode.startswith("I"):
            yield _DEEP
        elif image.mode == "F":
            yield "have floats (0 to 1 becomes 0 to 255)"
        elif image.mode not in _PLAIN:
            yield f"have the colours {image.mode} (RGB is used)"
        if image.mode in ("I", "F"):  # their values may lie anywhere
            plain(image)
