"""The data sources, one file each; what each needs is imported when it is used."""

from typing import TYPE_CHECKING

from geolora_pl.lazy import lazy_exports

if TYPE_CHECKING:
    from geolora_pl.data.cifar import CIFAR10, CIFAR100
    from geolora_pl.data.digits import Digits
    from geolora_pl.data.fashion_mnist import FashionMNIST
    from geolora_pl.data.folder import ImageFolder
    from geolora_pl.data.glue import GLUE
    from geolora_pl.data.images import ImageDataModule
    from geolora_pl.data.language import LanguageDataModule, LanguageFiles, LanguageHub
    from geolora_pl.data.text import TextDataModule
    from geolora_pl.data.text_files import TextFiles, TextHub
    from geolora_pl.data.tiny_imagenet import TinyImageNet
    from geolora_pl.data.unlabelled_images import UnlabelledImages
    from geolora_pl.data.unlabelled_texts import UnlabelledTexts

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
        "cifar": ["CIFAR10", "CIFAR100"],
        "digits": ["Digits"],
        "fashion_mnist": ["FashionMNIST"],
        "folder": ["ImageFolder"],
        "glue": ["GLUE"],
        "images": ["ImageDataModule"],
        "language": ["LanguageDataModule", "LanguageFiles", "LanguageHub"],
        "text": ["TextDataModule"],
        "text_files": ["TextFiles", "TextHub"],
        "tiny_imagenet": ["TinyImageNet"],
        "unlabelled_images": ["UnlabelledImages"],
        "unlabelled_texts": ["UnlabelledTexts"],
    },
)
