"""The pictures that a run gives to its loggers while it goes on, drawn from plain values."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence

from PIL import Image

from geolora_pl.report.heat_map import heat_map
from geolora_pl.report.rank_map import RankMap, depth_label, spread

_COLUMNS = 96  # of the ranks over time
_DEPTHS, ROWS = 128, 300  # at most, so that a picture of thousands of layers can be looked at
_DECADES = 2  # of singular values: tau drops most of what is smaller


def rank_map(places: RankMap, ranks: Mapping[str, int]) -> Image.Image:
    """Draw the ranks by kind of layer and depth.

    Args:
        places: The places of all adapters.
        ranks: The rank of each adapter.
    """
    return heat_map(
        [spread(row, _DEPTHS) for row in spread(places.rows(ranks), ROWS)],
        spread(list(places.short_kinds().values()), ROWS),
        [depth_label(depth) for depth in spread(places.depths, _DEPTHS)],
        f"rank by kind of layer and depth, {sum(ranks.values()) / len(ranks):.2f} on average",
        low=min(ranks.values()),
        high=max(ranks.values()),
        cell=(68, 48),
        numbers=True,
    )


def ranks_over_time(
    drawn: RankMap, number: int, steps: Sequence[int], ranks: Mapping[str, Sequence[int]]
) -> Image.Image:
    """Draw the rank of each adapter over the steps of a run.

    Args:
        drawn: The places of the adapters that are drawn.
        number: The number of all adapters.
        steps: Steps, ascending.
        ranks: The rank of each adapter at those steps.
    """
    there = [rank for name in drawn.places for rank in ranks.get(name, ())] or [0]
    last = steps[-1] if steps else 0
    columns = min(_COLUMNS, last + 1)
    at = [bisect_right(steps, last * (j + 1) // columns) - 1 for j in range(columns)]
    labels = [""] * columns
    labels[0], labels[-1] = str(steps[0]) if steps else "", str(last)
    return heat_map(
        [[ranks[name][i] if i >= 0 else None for i in at] for name in drawn.places],
        _row_labels(drawn),
        labels,
        f"rank by adapter over steps, from {min(there)} (light) to {max(there)} (dark){_how_many(drawn, number)}",
        low=min(there),
        high=max(there),
        cell=(10, _row_height(drawn)),
    )


def spectra(drawn: RankMap, number: int, sigmas: Mapping[str, Sequence[float]], highest: int) -> Image.Image:
    """Draw the singular values of each adapter.

    Args:
        drawn: The places of the adapters that are drawn.
        number: The number of all adapters.
        sigmas: The singular values of each adapter that is drawn, descending, as many as its rank.
        highest: The largest rank that an adapter can have.
    """
    largest = max((sigma[0] for sigma in sigmas.values() if len(sigma)), default=0.0)
    values: list[list[float | None]] = []
    for name in drawn.places:
        relative = [_decades(value, largest) for value in sigmas[name]]
        values.append([*relative, *[None] * (highest - len(relative))])
    few = highest <= 32
    return heat_map(
        values,
        _row_labels(drawn),
        [str(j + 1) if few else "" for j in range(highest)],
        f"singular values of S, largest {largest:.3g}, by their logarithm over {_DECADES} decades"
        f"{_how_many(drawn, number)}",
        low=-_DECADES,
        high=0,
        cell=(44 if few else 10, _row_height(drawn)),
    )


def _decades(value: float, largest: float) -> float:
    return math.log10(max(value / largest, 10.0**-_DECADES)) if largest else value


def _how_many(drawn: RankMap, number: int) -> str:
    return "" if len(drawn.places) == number else f" ({len(drawn.places)} of {number} adapters)"


def _row_height(drawn: RankMap) -> int:
    return min(32, 2400 // len(drawn.places))


def _row_labels(drawn: RankMap) -> list[str]:
    """A label for each adapter, or for the first of each kind where the rows are too many for their labels."""
    labels, firsts = drawn.short_names(), drawn.firsts()
    return [label if _row_height(drawn) >= 24 or name in firsts else "" for name, label in labels.items()]
