"""Decide which K and L an optimizer steps as one matrix, and with how many of their columns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geolora_pl.adapters.base import adapter_of
from geolora_pl.math.decomposition import computed_columns

# Measured on one core for 72 adapters of 768 and 3072 rows.
_CACHED = 2**18  # entries; 2**15 up to all of them were tried
_ALIKE = 8  # to a multiple of which columns are rounded up, so that more adapters have equally many
_WORTH_LEAVING_OUT = 32  # zero columns; fewer cost less than memory that is not contiguous


class Stack(NamedTuple):
    """K and L of several adapters, side by side, and the number of their columns that may be nonzero."""

    factors: list[Tensor]
    columns: int


def stacks(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Stack]:
    """Put together the adapters that have equally many columns; on a CPU about as many as its cache holds.

    Args:
        pairs: K and L of each adapter; of tensors that belong to no adapter all columns are taken.
    """
    groups: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    entries: dict[tuple[Any, ...], int] = defaultdict(int)
    for K, L in pairs:
        columns = _columns(K)
        key = (columns, K.dtype, K.device)
        groups[key] += K, L
        entries[key] += columns * (K.shape[0] + L.shape[0])
        if K.device.type == "cpu" and entries[key] > _CACHED:
            del entries[key]
            yield Stack(groups.pop(key), columns)
    for (columns, *_), factors in groups.items():
        yield Stack(factors, columns)


def _columns(K: Tensor) -> int:
    """The columns in use, probes included, where that pays; a GPU takes many matrices in a launch only if whole."""
    whole = K.shape[1]
    if K.device.type != "cpu" or (adapter := adapter_of(K)) is None:
        return whole
    live = adapter.probes + computed_columns(adapter.rank, adapter.max_rank, adapter.probes, _ALIKE)
    return live if whole - live >= _WORTH_LEAVING_OUT else whole


def leading(matrices: Sequence[Tensor], columns: int) -> list[Tensor]:
    """The leading columns of each matrix."""
    return [matrix if matrix.shape[1] == columns else matrix[:, :columns] for matrix in matrices]


@lru_cache(maxsize=16)
def owners(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """The number of the adapter that each row belongs to, for adapters with so many rows."""
    with torch.inference_mode(False):  # the cache keeps it for later steps
        return torch.arange(len(rows)).repeat_interleave(torch.tensor(rows), output_size=sum(rows)).to(device)
