"""Small files of images, as the data sets have them."""

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from geolora_pl.data import CIFAR10


def write_idx(path: Path, array: np.ndarray, compress: bool) -> None:
    content = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()
    if compress:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


def write_cifar(folder: Path, source: type[CIFAR10]) -> list[str]:
    """Twenty random images a file, two of each of ten classes, in CIFAR's own format, and the names of the classes.

    The hashes, which torchvision knows, do not fit: patch ``torchvision.datasets.cifar.check_integrity``.
    """
    origin = source._source
    key = "labels" if source is CIFAR10 else "fine_labels"
    names = [f"class {i}" for i in range(10 if source is CIFAR10 else 100)]
    (base := folder / origin.base_folder).mkdir()
    (base / origin.meta["filename"]).write_bytes(pickle.dumps({origin.meta["key"]: names}))
    rng = np.random.default_rng(0)
    for name, _ in origin.train_list + origin.test_list:
        batch = {"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), key: [*range(10)] * 2}
        (base / name).write_bytes(pickle.dumps(batch))
    return names


def write_tiny_imagenet(folder: Path) -> None:
    """The official layout with two classes, six training and two validation images of each; one image is grey."""
    wnids = {"n02": "goldfish, Carassius auratus", "n01": "tench"}  # the official wnids.txt is not sorted either
    (folder / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in wnids))
    (folder / "words.txt").write_text("".join(f"{wnid}\t{words}\n" for wnid, words in {"n00": "fish", **wnids}.items()))
    (folder / "val" / "images").mkdir(parents=True)
    for wnid in wnids:
        (folder / "train" / wnid / "images").mkdir(parents=True)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t63\t63\n")
        for i in range(6):
            image = Image.new("RGB" if i else "L", (64, 64), i * 40)
            image.save(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", format="JPEG")
    rows = []
    for i, wnid in enumerate(["n01", "n02", "n02", "n01"]):
        Image.new("RGB", (64, 64), (0, 0, i * 60)).save(folder / "val" / "images" / f"val_{i}.JPEG", format="JPEG")
        rows.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t63\t63\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(rows))


def write_image_folder(folder: Path) -> None:
    """Two classes of six images each, to train on."""
    for name in ("cat", "dog"):
        (folder / "train" / name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (64, 64), i * 40).save(folder / "train" / name / f"{i}.png")


def write_image_table(folder: Path, separator: str | None) -> None:
    """Such images, and a table of them in images/train.csv: with several labels per row, or with a number."""
    write_image_folder(folder)
    values = (f"sea{separator}sand", "sea", "") if separator else ("1", "2", "4")
    rows = [f"train/cat/{number % 6}.png,{values[number % 3]}" for number in range(60)]
    (folder / "images").mkdir()
    (folder / "images" / "train.csv").write_text("\n".join(["file,label", *rows]))
