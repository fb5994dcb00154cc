"""The data sources, one file each."""

from geolora_pl.data.digits import Digits
from geolora_pl.data.fashion_mnist import FashionMNIST
from geolora_pl.data.images import ImageDataModule

__all__ = ["Digits", "FashionMNIST", "ImageDataModule"]
