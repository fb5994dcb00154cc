"""Import names at their first use, so that a task does not need the libraries of another task."""

from __future__ import annotations

import ast
from collections.abc import Callable
from importlib import import_module
from pkgutil import get_data
from typing import Any

_EXTRAS = {
    "transformers": "text",
    "datasets": "text",
    "pyarrow": "text",
    "matplotlib": "report",
    "diffusers": "diffusion",
}  # library to extra


def lazy_exports(package: str) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """Make the ``__getattr__``, the ``__dir__`` (PEP 562) and the ``__all__`` of a package.

    Its public names stand in its ``__init__.pyi`` alone, where type checkers look for them: each is imported there from
    the module that defines it.

    Args:
        package: The package's ``__name__``.

    Example:
        >>> load, names, public = lazy_exports("geolora_pl")
        >>> load("GeoLoRAWarning").__name__, "GeoLoRAWarning" in names(), "GeoLoRAWarning" in public
        ('GeoLoRAWarning', True, True)
    """
    stub = get_data(package, "__init__.pyi") or b""
    imported = [node for node in ast.parse(stub).body if isinstance(node, ast.ImportFrom)]
    homes = {alias.name: str(node.module) for node in imported for alias in node.names}

    def load(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            module = import_module(homes[name])
        except ModuleNotFoundError as error:
            if error.name not in _EXTRAS:
                raise
            raise ImportError(_remedy(f"{package}.{name}", error.name)) from error
        return getattr(module, name)

    return load, lambda: sorted(homes), sorted(homes)


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


def find_class(class_path: str) -> type | None:
    """Import the class that the user names by its path; ``None`` for a function that makes an object."""
    try:
        return import_class(class_path)
    except ValueError:
        return None
