"""Import names at their first use, so that a task does not need the libraries of another task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

_EXTRAS = {"transformers": "text", "datasets": "text", "matplotlib": "report"}  # library to extra


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
            raise ImportError(_remedy(f"{package}.{name}", error.name)) from error
        return getattr(module, name)

    return load, lambda: sorted(homes)


def import_extra(module: str, what: str) -> Any:
    """Import a module that needs a library of an extra.

    Args:
        module: The full name of the module.
        what: What the module is needed for; an error message starts with it.

    Raises:
        ValueError: The library is missing.

    Example:
        >>> import_extra("geolora_pl.lazy", "this").__name__
        'geolora_pl.lazy'
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in _EXTRAS:
            raise
        raise ValueError(_remedy(what, library)) from error


def _remedy(what: str, library: str) -> str:
    return f"{what} needs {library}: pip install 'geolora_pl[{_EXTRAS[library]}]'"


def import_class(class_path: str) -> type:
    """Import the class that the user names by its path; a path from a checkpoint must not be given here.

    Raises:
        ValueError: There is no such class.
    """
    home, _, name = class_path.rpartition(".")
    try:
        found = getattr(import_module(home), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"class_path={class_path!r} cannot be imported: {error}") from error
    if not isinstance(found, type):
        raise ValueError(f"class_path={class_path!r} is not a class")
    return found
