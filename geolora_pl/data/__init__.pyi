# The sources, once: __init__.py reads them here, and so do type checkers.
from geolora_pl.data.images.base import ImageDataModule as ImageDataModule
from geolora_pl.data.images.cifar import CIFAR10 as CIFAR10
from geolora_pl.data.images.cifar import CIFAR100 as CIFAR100
from geolora_pl.data.images.digits import Digits as Digits
from geolora_pl.data.images.fashion_mnist import FashionMNIST as FashionMNIST
from geolora_pl.data.images.folder import ImageFolder as ImageFolder
from geolora_pl.data.images.tiny_imagenet import TinyImageNet as TinyImageNet
from geolora_pl.data.images.unlabelled import UnlabelledImages as UnlabelledImages
from geolora_pl.data.texts.glue import GLUE as GLUE
from geolora_pl.data.texts.labelled import TextDataModule as TextDataModule
from geolora_pl.data.texts.language import LanguageDataModule as LanguageDataModule
from geolora_pl.data.texts.language import LanguageFiles as LanguageFiles
from geolora_pl.data.texts.language import LanguageHub as LanguageHub
from geolora_pl.data.texts.sources import TextFiles as TextFiles
from geolora_pl.data.texts.sources import TextHub as TextHub
from geolora_pl.data.texts.unlabelled import UnlabelledTexts as UnlabelledTexts
