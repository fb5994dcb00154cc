"""Names of a package that are imported at their first use, so that a task needs the libraries of no other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module

_EXTRAS = {"transformers": "text", "datasets": "text"}  # by library


def lazy_exports(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Make the ``__getattr__`` and the ``__dir__`` of a package (PEP 562).

    Args:
        package: The package's ``__name__``.
        names: Its public names by the module that defines them.

    Example:
        >>> load, names = lazy_exports("geolora_pl", {"errors": ["GeoLoRAWarning"]})
        >>> load("GeoLoRAWarning").__name__, names()
        ('GeoLoRAWarning', ['GeoLoRAWarning'])
    """
    homes = {name: module for module, of_module in names.items() for name in of_module}

    def load(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            module = import_module(f"{package}.{homes[name]}")
        except ModuleNotFoundError as error:
            if error.name not in _EXTRAS:
                raise
            extra = _EXTRAS[error.name]
            raise ImportError(f"{package}.{name} needs {error.name}: pip install 'geolora_pl[{extra}]'") from error
        return getattr(module, name)

    return load, lambda: sorted(homes)
