"""Read the handwritten digits that come with scikit-learn: 1,797 real grey images of 8 x 8, without a download."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits
from torch.utils.data import Dataset

from geolora_pl.data.images.base import ArrayImages, ImageDataModule, hold_out
from geolora_pl.data.images.reader import Sample


class Digits(ImageDataModule):
    """The digits of scikit-learn (UCI, Alpaydin and Kaynak 1998); the seed draws 500 of them as test images."""

    test_size = 500

    @property
    def class_names(self) -> list[str]:
        """The ten digits."""
        return [str(digit) for digit in range(10)]

    def load_splits(self) -> dict[str, Dataset[Sample]]:
        """Read the images and hold out the test images."""
        digits = load_digits()
        samples = ArrayImages((digits.images * (255 / 16)).astype(np.uint8), digits.target)
        train, test = hold_out(samples, self.test_size, self.seed)
        return {"train": train, "test": test}
