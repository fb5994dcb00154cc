"""Read images that each have a caption, and prompts to draw images for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from geolora_pl.data.images.prompted import Batch, Picture, PromptedImages, images_in
from geolora_pl.lfs import refuse_pointer

METADATA = "metadata.jsonl"


class CaptionedImages(PromptedImages):
    """A folder of images with captions, in ``metadata.jsonl`` or in a text file beside each image.

    A line of ``metadata.jsonl`` is ``{"file_name": "dog.png", "text": "a dog on a beach"}``. Without that file, the
    caption of ``dog.png`` is the content of ``dog.txt``.

    Args:
        folder: The folder.
        **kwargs: Arguments of :class:`PromptedImages`.

    Raises:
        ValueError: There are no images, or one of them has no caption.
    """

    def __init__(self, folder: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.folder = folder

    @property
    def folder_of_training(self) -> str:
        """The folder of the training images."""
        return self.folder

    def pictures_in(self, folder: str, argument: str) -> list[Picture]:
        """List the images of a folder with their captions."""
        images = images_in(folder, argument)
        metadata = Path(folder, METADATA)
        captions = _of_metadata(metadata) if metadata.is_file() else _of_texts(images)
        if bare := [path.name for path in images if not captions.get(path.name)]:
            where = f"no line in {METADATA}" if metadata.is_file() else "no .txt beside it"
            raise ValueError(
                f"{argument}={folder!r}: {bare[0]} has no caption, {where} ({len(bare)} of {len(images)} images): give "
                "it one, or take it away"
            )
        names = {path.name for path in images}
        if absent := [name for name in captions if name not in names]:
            raise ValueError(f"{metadata} names {absent[0]}, which is not an image of the folder: correct the line")
        return [Picture(path, captions[path.name]) for path in images]


def _of_metadata(path: Path) -> dict[str, str]:
    captions: dict[str, str] = {}
    for number, line in enumerate(_lines(path), 1):
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}, line {number} must be {{"file_name": "...", "text": "..."}} and is {line[:80]!r}'
            ) from error
        if not isinstance(name, str) or not isinstance(text, str) or name in captions:
            raise ValueError(f"{path}, line {number}: {name!r} must be the name of a file, with one text: {text!r}")
        captions[name] = text.strip()
    return captions


def _of_texts(images: list[Path]) -> dict[str, str]:
    beside = {path.name: path.with_suffix(".txt") for path in images}
    return {name: " ".join(_lines(text)) for name, text in beside.items() if text.is_file()}


def _lines(path: Path) -> list[str]:
    """The lines of a text that are not empty."""
    refuse_pointer(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as text: {error}; save it as UTF-8") from error
    if "\0" in text:
        raise ValueError(f"{path} is not a text: it holds zero bytes")
    return [line for row in text.split("\n") if (line := row.strip())]


class PromptFile(L.LightningDataModule):
    r"""The prompts of a file, in their order, for ``predict`` alone: an image is drawn for each.

    Args:
        file: A text with one prompt per line; empty lines are left out.
        batch_size: Prompts per step and process, at least 1.

    Raises:
        ValueError: The file is missing, is not a text, or holds no prompt.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "prompts.txt")
        >>> _ = file.write_text("a dog on a beach\n\na dog in a car\n")
        >>> PromptFile(str(file)).prompts
        ['a dog on a beach', 'a dog in a car']
    """

    def __init__(self, file: str, batch_size: int = 1) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if not Path(file).is_file():
            raise ValueError(f"file={file!r} is not a file (from {Path.cwd()})")
        self.batch_size = batch_size
        self.prompts = _lines(Path(file))
        if not self.prompts:
            raise ValueError(f"file={file!r} holds no prompt: write one per line")

    @property
    def predict_inputs(self) -> dict[str, list[str]]:
        """The prompts, to write beside the images."""
        return {"prompt": self.prompts}

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the prompts with their numbers."""
        rows: Any = list(enumerate(self.prompts))
        return DataLoader(rows, batch_size=self.batch_size, collate_fn=_prompts)


def _prompts(rows: list[tuple[int, str]]) -> Batch:
    return {"indices": [index for index, _ in rows], "prompts": [prompt for _, prompt in rows]}
