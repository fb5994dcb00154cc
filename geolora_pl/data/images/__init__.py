"""This folder has the sources of images."""

from geolora_pl.data.images.base import ArrayImages, ImageDataModule

__all__ = ["ArrayImages", "ImageDataModule"]
