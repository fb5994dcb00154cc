"""The data sources, one file each."""

from geolora_pl.data.cifar import CIFAR10, CIFAR100
from geolora_pl.data.digits import Digits
from geolora_pl.data.fashion_mnist import FashionMNIST
from geolora_pl.data.folder import ImageFolder
from geolora_pl.data.images import ImageDataModule
from geolora_pl.data.tiny_imagenet import TinyImageNet

__all__ = ["CIFAR10", "CIFAR100", "Digits", "FashionMNIST", "ImageDataModule", "ImageFolder", "TinyImageNet"]
