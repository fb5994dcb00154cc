"""What the loaders deliver per second, beside what a step takes: cached token ids, tokenizing, and decoded images."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.io import decode_jpeg, read_file
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from benchmarks.speed import timing
from geolora_pl.data import ImageFolder
from geolora_pl.data.images.reader import read_image

HEADER = ["what", "workers or cores", "per second", "", "times the step's"]
STEPS = {"tokens": "throughput_minilm", "images": "throughput_vit_tiny"}  # the results with the rate of a step on a CPU
WORKERS = (0, 1, 2)
ROUNDS = 5
TASKS = ("sst2", "mrpc")  # single sentences, and pairs
TEXTS = 10_000
LONGEST = 128
IMAGES = 128
SIZE = (500, 400)  # width and height, usual in ImageNet
OF_VIT = {
    "input_size": (3, 224, 224),
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "interpolation": "bicubic",
    "crop_pct": 0.9,
}

Found = dict[str, Any]  # what is measured, by how many workers or cores, the quartiles per second, and their unit


def measure(glue: Path) -> list[Found]:
    """Measure everything; the texts are left out where GLUE is not there.

    Args:
        glue: Folder of GLUE in the official layout.
    """
    with tempfile.TemporaryDirectory() as folder:
        of_texts = [row for name in TASKS for row in texts(glue, name, Path(folder))] if glue.is_dir() else []
        return of_texts + list(images(Path(folder, "images")))


def rate(work: Callable[[], int], alone: bool) -> list[float]:
    """Quartiles of what is delivered per second, after a first time that is not counted.

    Args:
        work: Delivers everything once, and returns how much that was.
        alone: Whether no other process or thread takes part, so that the clock can be the process's own.
    """
    clock = time.process_time if alone else time.perf_counter
    work()
    rates = []
    for _ in range(ROUNDS):
        start = clock()
        amount = work()
        rates.append(amount / (clock() - start))
    return timing.quartiles(rates)


def row(what: str, number: int, rates: Sequence[float], unit: str) -> Found:
    return {"what": what, "number": number, "a_second": list(rates), "unit": unit}


def texts(glue: Path, task: str, cache: Path) -> Iterator[Found]:
    """Tokenize the first training texts of a task of GLUE with one core and with all, and load the token ids."""
    from benchmarks.shared.text_tasks import MODEL  # here, for gpu.sh times steps on machines without datasets
    from geolora_pl.data import GLUE
    from geolora_pl.data.texts.token_cache import tokenize
    from geolora_pl.tasks.text_models import load_config, load_tokenizer

    tokenizer = load_tokenizer(MODEL, load_config(MODEL, {}))
    data = GLUE(task, str(glue), cache_dir=str(cache), max_length=LONGEST)  # type: ignore[arg-type]  # a literal
    whole = data.load_splits()["train"]
    chosen = whole.select(range(min(TEXTS, len(whole))))
    for cores in sorted({1, os.cpu_count() or 1}):

        def made_again() -> int:
            with tempfile.TemporaryDirectory(dir=cache) as fresh:
                return sum(tokenize(chosen, tokenizer, LONGEST, Path(fresh), task)["length"][:])

        with mock.patch.dict(os.environ, TOKENIZERS_PARALLELISM=str(cores > 1).lower()):
            yield row(f"tokenizing {task}", cores, rate(made_again, cores == 1), "tokens")
    data.splits = {"train": tokenize(chosen, tokenizer, LONGEST, cache, task)}
    _attach(data, tokenizer=tokenizer)
    for data.num_workers in WORKERS:
        loader = data.train_dataloader()
        rates = rate(
            lambda loader=loader: sum(int(batch["attention_mask"].sum()) for batch in loader), not data.num_workers
        )
        yield row(f"loader of {task}", data.num_workers, rates, "tokens")


def images(folder: Path) -> Iterator[Found]:
    """Decode and transform JPEG images, in one process in several ways, and with the loader's processes."""
    write_images(folder / "train" / "noise")
    paths = sorted((folder / "train" / "noise").iterdir())
    of_timm = create_transform(**OF_VIT)
    of_tensors = tensor_transform()
    ways: dict[str, Callable[[Path], object]] = {
        "decoding alone (Pillow)": read_image,
        "Pillow, timm's transforms": lambda path: of_timm(read_image(path)),
        "Pillow, torchvision's transforms of tensors": lambda path: of_tensors(F.pil_to_tensor(read_image(path))),
    }
    try:
        decode_jpeg(read_file(str(paths[0])))
        ways["torchvision's decoder and transforms"] = lambda path: of_tensors(decode_jpeg(read_file(str(path))))
    except RuntimeError:  # a CPU build of torch has no decoder in the public wheel of torchvision
        pass
    for name, way in ways.items():
        yield row(name, 0, rate(lambda way=way: len([way(path) for path in paths]), alone=True), "images")
    data = ImageFolder(str(folder), batch_size=32)
    data.splits = data.load_splits()
    _attach(data, data_config=OF_VIT)
    for data.num_workers in WORKERS:
        loader = data.train_dataloader()
        rates = rate(lambda loader=loader: sum(len(labels) for _, labels in loader), not data.num_workers)
        yield row("loader of images", data.num_workers, rates, "images")


def write_images(folder: Path) -> None:
    """Write smooth noise as JPEG files, which are about as large as photographs."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(IMAGES):
        coarse = Image.fromarray(random.integers(0, 256, (SIZE[1] // 8, SIZE[0] // 8, 3), dtype=np.uint8))
        coarse.resize(SIZE, Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)


def tensor_transform() -> v2.Compose:
    """What timm's transforms do to an image that is not augmented, for tensors of 8 bits."""
    pixels = OF_VIT["input_size"][1]  # type: ignore[index]
    return v2.Compose(
        [
            v2.Resize(int(pixels / OF_VIT["crop_pct"]), v2.InterpolationMode.BICUBIC),  # type: ignore[operator]
            v2.CenterCrop(pixels),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(OF_VIT["mean"], OF_VIT["std"]),
        ]
    )


def _attach(data: Any, **wanted: object) -> None:
    """Give data a trainer of one process, whose module wants tokens or images of some kind."""
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(**wanted), distributed_sampler_kwargs=None)


def rows(found: Sequence[Found], steps: dict[str, float]) -> list[list[str]]:
    """The cells of the table.

    Args:
        found: What was measured.
        steps: What a step takes per second, by unit.
    """
    lines = []
    for of_way in found:
        middle = of_way["a_second"][1]
        over = middle / steps[of_way["unit"]]
        number = str(of_way["number"])
        lines.append([of_way["what"], number, f"{middle:,.0f}", of_way["unit"], f"{over:,.{1 if over < 100 else 0}f}"])
    return lines
