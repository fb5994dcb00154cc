"""This folder has the data sources; the libraries of a source are imported at its first use."""

from geolora_pl.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(__name__)
