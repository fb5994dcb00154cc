"""Files and folders that come inside an installed package, named by pkg://package/path."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

_PREFIX = "pkg://"


def in_package(name: str, argument: str) -> Path | None:
    """Find what lies in an installed package, which is not imported for that.

    Args:
        name: ``pkg://package/path``, or anything else.
        argument: What the setting is called; an error message starts with it.

    Returns:
        The path, whether or not there is something; ``None`` for a name without ``pkg://``.

    Raises:
        ValueError: The package is not installed.

    Example:
        >>> in_package("pkg://geolora_pl/configs/quickstart.yaml", "config").is_file()
        True
    """
    if not name.startswith(_PREFIX):
        return None
    package, _, inside = name.removeprefix(_PREFIX).partition("/")
    if Path(inside).is_absolute() or ".." in Path(inside).parts:
        raise ValueError(f"{argument}={name!r} leads out of the package: name a file inside of it")
    spec = find_spec(package) if package.isidentifier() and package != "__main__" else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{argument}={name!r}: no package {package!r} is installed; install it with pip")
    return Path(spec.submodule_search_locations[0], inside)
