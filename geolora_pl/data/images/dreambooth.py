"""Read a few images of one subject, and images of its class that keep what the model knew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from geolora_pl.data.images.prompted import Picture, PromptedImages, images_in
from geolora_pl.data.images.reader import list_images, plain, read_image
from geolora_pl.notes import keep_notes, note


class DreamBooth(PromptedImages):
    """The images of one subject, with one prompt for all of them (DreamBooth, arXiv 2208.12242).

    With class images, a batch holds as many of them as images of the subject, and an epoch shows each image of the
    larger group once. Those that are missing are drawn by the base model before the training, once.

    Args:
        folder: The folder with the images of the subject.
        prompt: What they show, with a rare word for the subject: ``a photo of sks dog``.
        class_folder: The folder with images of the class, made if it is missing; by default there is no prior
            preservation.
        class_prompt: What these show: ``a photo of a dog``.
        num_class_images: How many class images are used, at least 1; those that are missing are drawn.
        **kwargs: Arguments of :class:`PromptedImages`.

    Raises:
        ValueError: There are no images of the subject, or a class image has no prompt.
    """

    def __init__(
        self,
        folder: str,
        prompt: str,
        class_folder: str | None = None,
        class_prompt: str | None = None,
        num_class_images: int = 200,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not prompt.strip():
            raise ValueError(f"prompt={prompt!r} is empty: say what the images show, with a word for the subject")
        if (class_folder is None) != (class_prompt is None):
            raise ValueError(
                f"class_folder={class_folder!r} and class_prompt={class_prompt!r} belong together: give both, or none"
            )
        if num_class_images < 1:
            raise ValueError(f"num_class_images={num_class_images} must be at least 1")
        if class_folder is not None and Path(class_folder).exists() and not Path(class_folder).is_dir():
            raise ValueError(f"class_folder={class_folder!r} is a file: name a folder")
        self.folder = folder
        self.prompt = prompt
        self.class_folder = class_folder
        self.class_prompt = class_prompt
        self.num_class_images = num_class_images

    @property
    def folder_of_training(self) -> str:
        """The folder of the training images."""
        return self.folder

    def pictures_in(self, folder: str, argument: str) -> list[Picture]:
        """List the images of the subject in a folder, which all have the same prompt."""
        return [Picture(path, self.prompt) for path in images_in(folder, argument)]

    @property
    def prompts(self) -> list[str]:
        """The prompt, and that of the class."""
        return [self.prompt, *([] if self.class_prompt is None else [self.class_prompt])]

    def subject(self) -> list[Image.Image]:
        """Read the training images, with which drawn ones are compared."""
        return [plain(read_image(picture.path), "RGB") for picture in self.splits["train"]]

    def missing_class_images(self) -> dict[int, Path]:
        """The files of the class images that are still to be drawn, by their numbers."""
        if self.class_folder is None:
            return {}
        there = set(self._class_images())
        numbers = range(self.num_class_images)
        names = ((number, Path(self.class_folder, f"drawn_{number:04d}.png")) for number in numbers)
        free = [(number, path) for number, path in names if path not in there]
        return dict(free[: max(0, self.num_class_images - len(there))])

    def _class_images(self) -> list[Path]:
        folder = Path(self.class_folder or "")
        return list_images(folder, recursive=False)[0] if folder.is_dir() else []

    def prior_of_training(self) -> list[Picture]:
        """The class images, in the order of their names, those included that are drawn before the first step.

        Raises:
            ValueError: Some are missing, and the trained module does not draw them.
        """
        if self.class_folder is None or self.class_prompt is None:
            return []
        there, missing = self._class_images(), self.missing_class_images()
        module = self.trainer.lightning_module if self.trainer is not None else None
        if missing and not hasattr(module, "draw"):
            raise ValueError(
                f"class_folder={self.class_folder!r} lacks {len(missing)} of {self.num_class_images} class images, and "
                f"{type(module).__name__} draws none: add them, or lower num_class_images"
            )
        with keep_notes(self.notes):
            if there:
                images_in(self.class_folder, "class_folder")
            if missing:
                note(f"{self.class_folder}: {len(missing)} class images are drawn by the base model")
            if len(there) > self.num_class_images:
                note(f"{self.class_folder}: {self.num_class_images} of {len(there)} class images are used")
        used = sorted([*there, *missing.values()])[: self.num_class_images]
        return [Picture(path, self.class_prompt, is_prior=True) for path in used]
