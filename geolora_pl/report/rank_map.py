"""Where the adapters of a model stand: their names as kinds of layer (rows) and depth (columns)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import TypeVar

T = TypeVar("T")
Depth = tuple[int, ...]
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class RankMap:
    """The places of adapters.

    Attributes:
        kinds: Kinds of layer, in the order of the model: names with ``*`` for the depth.
        depths: All depths there are, ascending; empty for a layer without one.
        places: Kind and depth by the adapter's name, kind by kind and from the first layer to the last.

    Example:
        >>> places = RankMap.of(["blocks.0.fc", "blocks.1.fc", "blocks.1.norm"])
        >>> places.kinds, places.depths, places.places["blocks.1.fc"]
        (('blocks.*.fc', 'blocks.*.norm'), ((0,), (1,)), ('blocks.*.fc', (1,)))
    """

    kinds: Sequence[str]
    depths: Sequence[Depth]
    places: Mapping[str, tuple[str, Depth]]

    @classmethod
    def of(cls, names: Iterable[str]) -> RankMap:
        """The map of adapters by their names.

        A number between two dots is a depth where it differs among layers that are else of one name (or where it is
        the only one); where all have the same, it belongs to the kind, as the sublayers of T5 do.
        """
        alike: dict[str, list[str]] = {}
        for name in names:
            alike.setdefault(_NUMBER.sub("*", name), []).append(name)
        placed: dict[str, tuple[str, Depth]] = {}
        for of_kind in alike.values():
            numbers = {name: [int(number) for number in _NUMBER.findall(name)] for name in of_kind}
            columns = list(zip(*numbers.values(), strict=True))
            varying = {i for i, column in enumerate(columns) if len(set(column)) > 1} or {0}
            for name in sorted(of_kind, key=lambda name: numbers[name]):
                depth = tuple(number for i, number in enumerate(numbers[name]) if i in varying)
                placed[name] = _kind(name, varying), depth
        kinds = dict.fromkeys(kind for kind, _ in placed.values())
        return cls(tuple(kinds), tuple(sorted({depth for _, depth in placed.values()})), placed)

    def rows(self, values: Mapping[str, float]) -> list[list[float | None]]:
        """Values by adapter as a table: one row per kind, one column per depth, ``None`` where there is no adapter."""
        found = {self.places[name]: value for name, value in values.items()}
        return [[found.get((kind, depth)) for depth in self.depths] for kind in self.kinds]

    def thinned(self, most: int) -> RankMap:
        """The map of at most so many of the adapters, spread evenly over all of them."""
        placed = {name: self.places[name] for name in spread(list(self.places), most)}
        kinds = dict.fromkeys(kind for kind, _ in placed.values())
        return RankMap(tuple(kinds), tuple(sorted({depth for _, depth in placed.values()})), placed)

    def of_kind(self, kind: str) -> list[str]:
        """The adapters of one kind, from the first layer to the last."""
        return list(self._by_kind[kind])

    @cached_property
    def _by_kind(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, (kind, _) in self.places.items():
            found.setdefault(kind, []).append(name)
        return found

    def firsts(self) -> set[str]:
        """The first adapter of every kind."""
        return {self.of_kind(kind)[0] for kind in self.kinds}

    @property
    def beginning(self) -> str:
        """What the names of all kinds begin with, and labels leave out; empty if they have nothing in common."""
        return ".".join(self.kinds[0].split(".")[: _in_common(self.kinds)]) if self.kinds else ""

    def short_kinds(self) -> dict[str, str]:
        """Labels of the kinds: without the beginning that all have in common."""
        same = _in_common(self.kinds)
        return {kind: ".".join(kind.split(".")[same:]) for kind in self.kinds}

    def short_names(self) -> dict[str, str]:
        """Labels of the adapters: kind and depth."""
        kinds = self.short_kinds()
        return {name: f"{kinds[kind]} {depth_label(depth)}".strip() for name, (kind, depth) in self.places.items()}


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Names without the beginning that all have in common; what is left still tells the depth.

    Example:
        >>> list(short_names(["model.blocks.0.fc", "model.blocks.1.fc"]).values())
        ['blocks.0.fc', 'blocks.1.fc']
    """
    found = list(names)
    same = _in_common(found)
    while same and any(name.split(".")[same].isdecimal() for name in found):
        same -= 1  # a number is a depth by what stands before it
    return {name: ".".join(name.split(".")[same:]) for name in found}


def _in_common(names: Sequence[str]) -> int:
    """How many parts all names begin with, of those before the last."""
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)  # as many as the shortest name has
    return len(list(takewhile(lambda column: len(set(column)) == 1, columns)))


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many of some items, from the first to the last at even distances.

    Args:
        items: The items.
        most: Their number at most, at least 2.

    Example:
        >>> spread(range(10), 4), spread(range(3), 4)
        ([0, 3, 6, 9], [0, 1, 2])
    """
    if len(items) <= most:
        return list(items)
    return [items[i * (len(items) - 1) // (most - 1)] for i in range(most)]


def depth_label(depth: Depth) -> str:
    """A depth as text.

    Example:
        >>> depth_label((1, 5))
        '1.5'
    """
    return ".".join(map(str, depth))


def _kind(name: str, varying: set[int]) -> str:
    position = -1

    def star(number: re.Match[str]) -> str:
        nonlocal position
        position += 1
        return "*" if position in varying else number[0]

    return _NUMBER.sub(star, name)
