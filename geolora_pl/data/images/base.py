"""Define the base of the image sources: splits, the model's own transforms, loaders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, random_split
from torchvision.transforms import RandomCrop

from geolora_pl.data.images.reader import Label, Sample, plain
from geolora_pl.data.settings import check_batches, settle_num_workers
from geolora_pl.notes import keep_notes, note


class ArrayImages(Dataset[Sample]):
    """Images held in memory as one array.

    Args:
        images: ``(n, height, width)`` grey or ``(n, height, width, 3)`` colour, uint8.
        labels: ``(n,)`` class indices.
    """

    def __init__(self, images: np.ndarray[Any, Any], labels: Sequence[int]) -> None:
        if len(images) != len(labels):
            raise ValueError(
                f"there are {len(images)} images and {len(labels)} labels: the files do not belong together"
            )
        if images.dtype != np.uint8:
            raise ValueError(f"an array of {images.dtype} does not hold images of 8 bits: scale it to 0..255 as uint8")
        if images.ndim not in (3, 4):
            raise ValueError(
                f"an array of shape {images.shape} does not hold images: the files are not what their names say"
            )
        self.images = images
        self.labels = [int(label) for label in labels]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return Image.fromarray(self.images[index]), self.labels[index]


class _Transformed(Dataset[tuple[Tensor, Label]]):
    def __init__(
        self, samples: Dataset[Sample], mode: str, transform: Callable[[Image.Image], Tensor], crop_padding: int = 0
    ) -> None:
        self.samples, self.mode, self.transform, self.crop_padding = samples, mode, transform, crop_padding

    def __len__(self) -> int:
        return len(self.samples)  # type: ignore[arg-type]  # every source here is a sized data set

    def __getitem__(self, index: int) -> tuple[Tensor, Label]:
        image, label = self.samples[index]
        image = plain(image, self.mode)
        if self.crop_padding:
            crop = RandomCrop((image.height, image.width), self.crop_padding, padding_mode="reflect")
            image = crop(image)
        return self.transform(image), label


class ImageDataModule(L.LightningDataModule):
    """The base of the image sources: a subclass names its classes and loads its samples.

    Images get the size, channels and normalisation that the trained model expects. The task offers these as
    ``data_config`` (``timm.data.resolve_model_data_config``), and the transforms come from ``timm.data``.

    Args:
        batch_size: Images per step and process, at least 1.
        val_fraction: The share of the training images that is held out for validation if the source has no validation
            split, in (0, 1).
        seed: Seed of the splits.
        num_workers: Number of loader processes; by default the number of cores beyond the first two, at most 8, so
            that they do not slow the training down on a small machine.
        augment: Arguments of ``timm.data.create_transform`` for the training images, such as
            ``{hflip: 0.5, scale: [0.8, 1.0]}``; by default the training images are not augmented.
        crop_padding: Pixels by which every training image is padded with its own reflection before a random part of
            its old size is taken, at least 0: the usual augmentation of CIFAR is 4 with ``hflip``.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int | None = None,
        augment: dict[str, Any] | None = None,
        crop_padding: int = 0,
    ) -> None:
        super().__init__()
        if crop_padding < 0:
            raise ValueError(f"crop_padding={crop_padding} must be at least 0 pixels")
        check_batches(batch_size, val_fraction)
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.seed = seed
        self.num_workers = settle_num_workers(num_workers)
        self.augment = augment
        self.crop_padding = crop_padding
        self.splits: dict[str, Dataset[Sample]] = {}
        self.notes: list[str] = []  # what the user is told about the data

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of their indices."""
        raise NotImplementedError(f"{type(self).__name__} must name its classes")

    @property
    def multi_label(self) -> bool | None:
        """Whether an image may have several labels or none; ``None`` where nobody knows it here."""
        return False

    @property
    def num_classes(self) -> int | None:
        """Number of classes; ``None`` without names of classes, because then only the model knows it."""
        return len(self.class_names) or None

    def load_splits(self) -> dict[str, Dataset[Sample]]:
        """Read the samples of those of the splits ``train``, ``test``, ``val`` and ``predict`` that the source has."""
        raise NotImplementedError(f"{type(self).__name__} must load its samples")

    def setup(self, stage: str) -> None:
        """Load the samples once and hold out a part of ``train`` if there is no ``val``."""
        if self.splits:
            return
        with keep_notes(self.notes):
            self.splits = self._load()

    def _load(self) -> dict[str, Dataset[Sample]]:
        splits = self.load_splits()
        for split, samples in splits.items():
            self._check(split, samples)
        if "train" in splits and "val" not in splits:
            total = len(splits["train"])  # type: ignore[arg-type]  # every source here is a sized data set
            count = round(self.val_fraction * total)
            if not 0 < count < total:
                raise ValueError(
                    f"val_fraction={self.val_fraction} of {total} images is {count}: choose it so that training and "
                    "validation both have images"
                )
            samples = splits["train"]
            splits["train"], splits["val"] = hold_out(samples, count, self.seed)
            self._refuse_untrained(samples, splits["train"])
            note(f"{count} of {total} training images are held out for validation (val_fraction={self.val_fraction})")
        return splits

    def _refuse_untrained(self, samples: Dataset[Sample], train: Dataset[Sample]) -> None:
        """Refuse a class or label of which all images are held out, or a class the only image of which might be."""
        if (several := _several(samples)) is not None and (rest := _several(train)) is not None:
            for name, there_are, left in zip(self.class_names, several.sum(0), rest.sum(0), strict=True):
                if left == 0 < there_are:
                    raise ValueError(
                        f"label {name!r} is that of {there_are:g} of the images, and all of them are held out: add "
                        "images, give images for validation, or choose another seed"
                    )
        there, trained = Counter(_labels_of(samples)), Counter(_labels_of(train))
        for label, name in enumerate(self.class_names if there else []):
            if there[label] == 1 or trained[label] == 0 < there[label]:
                raise ValueError(
                    f"class {name!r} has {there[label]} of the images, which cannot be both in training and held out: "
                    "add images, drop the class, give images for validation, or choose another seed"
                )

    def _check(self, split: str, samples: Dataset[Sample]) -> None:
        """Refuse an empty split, and labels of no class if the labels are known without reading the images."""
        if not len(samples):  # type: ignore[arg-type]  # every source here is a sized data set
            raise ValueError(f"{type(self).__name__} has no {split} images: the split is empty, so fill or remove it")
        classes = len(self.class_names)
        for index, label in enumerate(_labels_of(samples) if classes else []):
            if not 0 <= label < classes:
                raise ValueError(
                    f"{split} image {index} has label {label}, and the {classes} classes are 0 to {classes - 1}: fix "
                    "the labels"
                )

    def data_config(self) -> Mapping[str, Any]:
        """Return the input size, mean, standard deviation and interpolation that the model expects.

        Raises:
            ValueError: The module that is trained has no ``data_config``.
        """
        module = self.trainer.lightning_module if self.trainer is not None else None
        config = getattr(module, "data_config", None)
        if not isinstance(config, Mapping):
            raise ValueError(
                f"{type(module).__name__} has no data_config: give it one, "
                "data_config = timm.data.resolve_model_data_config(model), so that images get the size it expects"
            )
        return config

    def _loader(self, split: str) -> DataLoader[Any]:
        if split not in self.splits:
            raise ValueError(f"{type(self).__name__} has no {split} images: it has {', '.join(self.splits)}")
        training = split == "train"
        config = self.data_config()
        augment = (self.augment or {"no_aug": True}) if training else {}
        try:
            transform = create_transform(**config, is_training=training, **augment)
        except TypeError as error:
            raise ValueError(f"augment={augment!r} does not suit timm's create_transform: {error}") from error
        mode = self._mode(config["input_size"][0], self.splits[split])
        return DataLoader(
            _Transformed(self.splits[split], mode, transform, self.crop_padding if training else 0),
            batch_size=self.batch_size,
            shuffle=training,
            num_workers=self.num_workers,
            # What workers draw for augmentation must not depend on earlier epochs, which a resumed run has not seen.
            persistent_workers=self.num_workers > 0 and not (training and (self.augment or self.crop_padding)),
            pin_memory=torch.cuda.is_available(),
        )

    def _mode(self, channels: int, samples: Dataset[Sample]) -> str:
        if channels not in (1, 3):
            raise ValueError(f"the model takes images of {channels} channels, but these data have 1 or 3: set in_chans")
        if channels == 1 and plain(samples[0][0]).mode != "L":
            with keep_notes(self.notes):
                note("colour images become grey, because the model takes one channel")
        return "L" if channels == 1 else "RGB"

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled training images."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        """Return validation images."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Return test images."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the images to predict, or the test images if there are none."""
        return self._loader("predict" if "predict" in self.splits else "test")


def hold_out(samples: Dataset[Sample], count: int, seed: int) -> list[Subset[Sample]]:
    """Split samples into the rest and ``count`` held-out samples; the seed decides which."""
    rest = len(samples) - count  # type: ignore[arg-type]  # every source here is a sized data set
    return random_split(samples, [rest, count], torch.Generator().manual_seed(seed))


def _several(samples: Dataset[Sample]) -> Tensor | None:
    """0 and 1 for each of several labels (images, labels); ``None`` of a source without, or of another kind."""
    if isinstance(samples, Subset):
        labels = _several(samples.dataset)
        return None if labels is None else labels[list(samples.indices)]
    labels = getattr(samples, "labels", None)
    return labels if isinstance(labels, Tensor) and labels.dim() == 2 else None


def _labels_of(samples: Dataset[Sample]) -> Sequence[int]:
    """The class indices that are known without reading the images; none of a source of another kind."""
    if isinstance(samples, Subset):
        labels = _labels_of(samples.dataset)
        return [labels[index] for index in samples.indices] if labels else ()
    labels = getattr(samples, "labels", ())
    return () if isinstance(labels, Tensor) else labels
