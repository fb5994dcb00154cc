"""Names of modules: which of them a setting means, and which modules one lies in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TypeVar

T = TypeVar("T")


def ancestors(name: str) -> Iterator[str]:
    """The modules that a module or tensor lies in by their names, the outermost first, without the model itself.

    Example:
        >>> list(ancestors("blocks.0.fc"))
        ['blocks', 'blocks.0']
    """
    return accumulate(name.split(".")[:-1], "{}.{}".format)


def endings(name: str) -> Iterator[str]:
    """The name as a whole, and what is left of it after each dot.

    Example:
        >>> list(endings("blocks.0.fc"))
        ['blocks.0.fc', '0.fc', 'fc']
    """
    parts = name.split(".")
    return (".".join(parts[first:]) for first in range(len(parts)))


def alternation(names: Iterable[str]) -> str:
    """The regular expression that matches these modules and no others."""
    return f"({'|'.join(map(re.escape, names))})"


def names_in(expression: object) -> list[str]:
    r"""The names in an expression of :func:`alternation`, which is never run: a stranger's may take for ever.

    Raises:
        ValueError: It is another expression.

    Example:
        >>> names_in(r"(0|2\.0)")
        ['0', '2.0']
    """
    inner = expression[1:-1] if isinstance(expression, str) else ""
    names = [re.sub(r"\\(.)", r"\1", name) for name in re.split(r"(?<!\\)\|", inner)]
    if alternation(names) != expression:
        raise ValueError(f"{expression!r} does not list names of layers")
    return names


def matcher(patterns: str | Sequence[str]) -> Callable[[str], bool]:
    r"""Say whether a name matches one regular expression as a whole, or a list of names and name endings.

    What is prepared here for all names is not repeated for each: a file of an adapter lists every layer, and going
    through the list for every layer would take the square of their number.

    Example:
        >>> of_list, of_expression = matcher(["fc", "0.norm"]), matcher(r".*\.fc\d")
        >>> of_list("blocks.0.fc"), of_list("blocks.1.norm"), of_expression("blocks.0.fc2")
        (True, False, True)
    """
    if isinstance(patterns, str):
        try:
            return frozenset(names_in(patterns)).__contains__
        except ValueError:
            expression = re.compile(patterns)
            return lambda name: expression.fullmatch(name) is not None
    meant = frozenset(patterns)
    return lambda name: not meant.isdisjoint(endings(name))


def meant_by(patterns: str | Sequence[str], names: Iterable[str]) -> dict[str, list[str]]:
    """The names that a regular expression means, or each entry of a list, by the expression or entry.

    Example:
        >>> meant_by(["fc", "head"], ["0.fc", "1.fc"])
        {'fc': ['0.fc', '1.fc'], 'head': []}
    """
    if isinstance(patterns, str):
        return {patterns: list(filter(matcher(patterns), names))}
    found: dict[str, list[str]] = {pattern: [] for pattern in patterns}
    for name in names:
        for ending in endings(name):
            if ending in found:
                found[ending].append(name)
    return found


def first_meant(values: Mapping[str, T], expression: str = "{}") -> Callable[[str], T | None]:
    """Find the value of the first key that means a name, as its ending or as a regular expression.

    A key of letters, digits, dots and dashes is a name and no expression, so that a key per layer takes no longer than
    a few keys for all.

    Args:
        values: By names, endings of names and regular expressions.
        expression: What to match a whole name with, where ``{}`` stands for the key.

    Example:
        >>> value = first_meant({"0.fc": 4, ".*fc": 8})
        >>> value("blocks.0.fc"), value("blocks.1.fc"), value("head")
        (4, 8, None)
    """
    places = {key: place for place, key in enumerate(values)}
    expressions = {key: matcher(expression.format(key)) for key in values if not _is_name(key)}

    def find(name: str) -> T | None:
        found = [ending for ending in endings(name) if ending in places]
        found += next(([key] for key, meant in expressions.items() if meant(name)), [])
        return values[min(found, key=places.__getitem__)] if found else None

    return find


def means_nothing(patterns: Iterable[str], names: Sequence[str]) -> list[str]:
    """The keys of :func:`first_meant` that mean none of these names."""
    left = [pattern for pattern, meant in meant_by(list(patterns), names).items() if not meant]
    return [pattern for pattern in left if _is_name(pattern) or not any(map(matcher(pattern), names))]


def _is_name(key: str) -> bool:
    return re.fullmatch(r"[\w.-]+", key) is not None
