"""This folder has the data sources; the libraries of a source are imported at its first use."""

from typing import TYPE_CHECKING

from geolora_pl.lazy import lazy_exports

if TYPE_CHECKING:
    from geolora_pl.data.images.base import ImageDataModule
    from geolora_pl.data.images.cifar import CIFAR10, CIFAR100
    from geolora_pl.data.images.digits import Digits
    from geolora_pl.data.images.fashion_mnist import FashionMNIST
    from geolora_pl.data.images.folder import ImageFolder
    from geolora_pl.data.images.tiny_imagenet import TinyImageNet
    from geolora_pl.data.images.unlabelled import UnlabelledImages
    from geolora_pl.data.texts.glue import GLUE
    from geolora_pl.data.texts.labelled import TextDataModule
    from geolora_pl.data.texts.language import LanguageDataModule, LanguageFiles, LanguageHub
    from geolora_pl.data.texts.sources import TextFiles, TextHub
    from geolora_pl.data.texts.unlabelled import UnlabelledTexts

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "GLUE",
    "Digits",
    "FashionMNIST",
    "ImageDataModule",
    "ImageFolder",
    "LanguageDataModule",
    "LanguageFiles",
    "LanguageHub",
    "TextDataModule",
    "TextFiles",
    "TextHub",
    "TinyImageNet",
    "UnlabelledImages",
    "UnlabelledTexts",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "images.cifar": ["CIFAR10", "CIFAR100"],
        "images.digits": ["Digits"],
        "images.fashion_mnist": ["FashionMNIST"],
        "images.folder": ["ImageFolder"],
        "texts.glue": ["GLUE"],
        "images.base": ["ImageDataModule"],
        "texts.language": ["LanguageDataModule", "LanguageFiles", "LanguageHub"],
        "texts.labelled": ["TextDataModule"],
        "texts.sources": ["TextFiles", "TextHub"],
        "images.tiny_imagenet": ["TinyImageNet"],
        "images.unlabelled": ["UnlabelledImages"],
        "texts.unlabelled": ["UnlabelledTexts"],
    },
)
