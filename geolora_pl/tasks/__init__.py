"""This folder has the tasks (model, loss and metrics); the libraries of a task are imported at its first use."""

from geolora_pl.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(__name__)
