"""GeoLoRA: low-rank fine-tuning that finds its own ranks, for PyTorch Lightning.

Names are imported at their first use: the adapters, the integrator and the optimizer do without Lightning.
``__init__.pyi`` lists them.
"""

from geolora_pl.lazy import lazy_exports

_load, __dir__, __all__ = lazy_exports(__name__)


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("geolora_pl")
    return _load(name)
