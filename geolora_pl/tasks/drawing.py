"""Draw images for prompts, write them, and show them while a model trains."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image
from torch import Tensor, nn

from geolora_pl.adapters.inject import find_adapters
from geolora_pl.lightning.monitor import show_picture, shows_pictures
from geolora_pl.report.drawn import FOLDER, folder_of_step
from geolora_pl.storage.atomic import atomic
from geolora_pl.tasks.modes import evaluation

METADATA = "metadata.jsonl"
_AT_ONCE = 4  # images of one prompt


@torch.no_grad()
def draw(
    pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], size: int, steps: int, guidance_scale: float
) -> list[Image.Image]:
    """Draw an image for each prompt, the same on every device up to rounding.

    Args:
        pipeline: Of diffusers; its parts are in evaluation mode while it draws.
        prompts: What to draw.
        seeds: The seed of each image.
        size: The side of the images in pixels.
        steps: Steps of the sampler, at least 1.
        guidance_scale: How much more the prompt counts than no prompt; 1 for no guidance.
    """
    with evaluation(*(part for part in pipeline.components.values() if isinstance(part, nn.Module))):
        drawn = pipeline(
            prompt=list(prompts),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            height=size,
            width=size,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
        )
    return list(drawn.images)


@contextmanager
def base_alone(model: nn.Module) -> Iterator[None]:
    """Leave the updates of all adapters out for a while."""
    adapters = find_adapters(model).values()
    scalings = [layer.scaling for layer in adapters]
    for layer in adapters:
        layer.scaling = 0.0
    try:
        yield
    finally:
        for layer, scaling in zip(adapters, scalings, strict=True):
            layer.scaling = scaling


def write_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture completely or not at all, and make the folders above it."""
    with atomic(path) as unfinished:
        picture.save(unfinished, format="PNG")


def check_lengths(tokenizer: Any, prompts: Sequence[str]) -> None:
    """Refuse prompts that the text encoder would see only a part of.

    Args:
        tokenizer: Of the text encoder; it knows how many tokens that takes.
        prompts: Any number of them.

    Raises:
        ValueError: One is too long.
    """
    most = tokenizer.model_max_length
    lengths = [len(ids) for ids in tokenizer(list(prompts), verbose=False).input_ids] if prompts else []
    if long := [(prompt, n) for prompt, n in zip(prompts, lengths, strict=True) if n > most]:
        prompt, length = long[0]
        raise ValueError(
            f"the prompt {prompt[:80]!r} has {length} tokens and the text encoder takes {most} ({len(long)} such "
            "prompts): shorten it"
        )


def draw_files(
    draw: Callable[[Sequence[str], Sequence[int]], list[Image.Image]],
    paths: Mapping[int, Path],
    prompt: str,
) -> None:
    """Draw an image of one prompt for each file, a few at once; those that are finished stay after an interruption.

    Args:
        draw: Draws images for prompts with seeds.
        paths: The files by their numbers, which are the seeds: what is drawn later differs from what is there.
        prompt: What they show.
    """
    numbers = list(paths)
    for start in range(0, len(numbers), _AT_ONCE):
        some = numbers[start : start + _AT_ONCE]
        for number, picture in zip(some, draw([prompt] * len(some), some), strict=True):
            write_picture(picture, paths[number])


def show_drawn(trainer: L.Trainer, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> None:
    """Give the pictures of a validation to the loggers, and to the folder of the run.

    Args:
        trainer: Its step is the name of the folder.
        pictures: One per prompt.
        prompts: What they should show, kept beside them as ``metadata.jsonl``.
    """
    folder = trainer.log_dir  # of which all processes must ask
    if not trainer.is_global_zero:
        return
    for logger in filter(shows_pictures, trainer.loggers):
        for number, picture in enumerate(pictures):
            show_picture(logger, f"{FOLDER}_{number}", picture, trainer.global_step)
    inside = folder_of_step(Path(folder or trainer.default_root_dir), trainer.global_step)
    for number, picture in enumerate(pictures):
        write_picture(picture, inside / _name(number))
    _write_prompts(inside, dict(enumerate(prompts)))


def _name(number: int) -> str:
    return f"{number:05d}.png"


def _write_prompts(folder: Path, prompts: dict[int, str]) -> None:
    lines = [json.dumps({"file_name": _name(n), "text": text}, ensure_ascii=False) for n, text in prompts.items()]
    with atomic(folder / METADATA) as unfinished:
        unfinished.write_text("\n".join(lines) + "\n", encoding="utf-8")


class PictureWriter(BasePredictionWriter):
    """Write the images that ``predict`` draws into a folder, with their prompts in ``metadata.jsonl``.

    The files are named by the numbers of the prompts, and the folder is one that ``CaptionedImages`` reads.

    Args:
        output: The folder; ``None`` to keep only the prompts in memory.

    Attributes:
        rows: The number and the prompt of each image, in the main process.

    Raises:
        ValueError: There is something in the folder, or it is a file.
    """

    def __init__(self, output: str | Path | None) -> None:
        super().__init__(write_interval="batch")
        self.output = None if output is None else Path(output)
        if self.output is not None and self.output.exists() and not self.output.is_dir():
            raise ValueError(f"output={str(output)!r} is a file, and images need a folder: name one")
        if self.output is not None and self.output.is_dir() and any(self.output.iterdir()):
            raise ValueError(f"output={str(output)!r} is a folder that is not empty: name another one")
        self.rows: list[dict[str, Any]] = []

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Tensor,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the images of a batch."""
        for number, image in zip(batch["indices"], prediction, strict=True):
            if self.output is not None:
                write_picture(Image.fromarray(image.movedim(0, -1).cpu().numpy()), self.output / _name(number))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the prompts."""
        prompts: dict[int, str] = dict(enumerate(trainer.datamodule.prompts))  # type: ignore[attr-defined]
        self.rows = [{"index": number, "prompt": prompt} for number, prompt in prompts.items()]
        if self.output is not None and trainer.is_global_zero:
            _write_prompts(self.output, prompts)


def as_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures as (batch, 3, height, width) of uint8."""
    return torch.from_numpy(np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])).movedim(-1, 1)
