"""The tasks: model, loss and metrics; what each needs is imported when it is used."""

from geolora_pl.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(__name__)
