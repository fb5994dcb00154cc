"""Read the handwritten digits that come with scikit-learn: 1,797 real grey images of 8 x 8, without a download."""

from __future__ import annotations

import numpy as np
from torch.utils.data import Dataset

from geolora_pl.data.images.base import ArrayImages, ImageDataModule, hold_out
from geolora_pl.data.images.reader import Sample
from geolora_pl.packaged import in_package

# A row has 64 values of 0 to 16 and the digit. load_digits reads the same file, but importing scikit-learn takes .3 s
# of CPU time, because it imports pandas where that is installed.
_TABLE = "pkg://sklearn/datasets/data/digits.csv.gz"


class Digits(ImageDataModule):
    """The digits of scikit-learn (UCI, Alpaydin and Kaynak 1998); the seed draws 500 of them as test images."""

    test_size = 500

    @property
    def class_names(self) -> list[str]:
        """The ten digits."""
        return [str(digit) for digit in range(10)]

    def load_splits(self) -> dict[str, Dataset[Sample]]:
        """Read the images and hold out the test images."""
        path = in_package(_TABLE, "digits")
        assert path is not None
        table = np.loadtxt(path, delimiter=",")
        images = (table[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
        train, test = hold_out(ArrayImages(images, table[:, 64].astype(int).tolist()), self.test_size, self.seed)
        return {"train": train, "test": test}
