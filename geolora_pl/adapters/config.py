"""The configuration of the adapters, checked when it is made."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Literal, TypeVar

from geolora_pl.adapters.elsewhere import ELSEWHERE

_T = TypeVar("_T")


def _names_of_others_refused(config: type[_T]) -> type[_T]:
    """Let a class say by a ValueError what a setting of another library is called here."""
    init = config.__init__

    @wraps(init)
    def checked(self: object, *args: object, **kwargs: object) -> None:
        for name in kwargs:
            if name in ELSEWHERE:
                raise ValueError(
                    f"{name}={kwargs[name]!r} is not a setting of {config.__name__}: set {ELSEWHERE[name]}"
                )
        init(self, *args, **kwargs)

    config.__init__ = checked  # type: ignore[method-assign]
    return config


@_names_of_others_refused
@dataclass(frozen=True)
class AdapterConfig:
    """What is adapted, and how large the adapters may become.

    Args:
        init_rank: Rank at the start, in [1, max_rank]; where the ranks end hardly depends on it.
        max_rank: Columns allocated for every adapter, at least 1: the most its rank can become. Cut to the smaller
            side of the layer's matrix.
        target_modules: ``"all-linear"`` (every linear layer, GPT-2's Conv1D among them, but the task head and
            ``modules_to_save``), a list of names (a module matches by its whole name or its last components), or one
            regular expression that must match the whole name, as in PEFT; names also reach convolutions and
            embeddings. A task also accepts ``"auto"``, which means the layers that suit its model.
        exclude_modules: A list of names or one regular expression, matched in the same way; these are never adapted.
        modules_to_save: Names of modules that are trained in full, such as a new head.
        alpha: Constant factor of the update, above 0: ``scaling = alpha``, never a function of the rank. A setting
            ``alpha / r`` of other libraries carries over as ``alpha / r``.
        dropout: Probability that an input of the adapter is dropped in training, in [0, 1).
        train_bias: Whether the biases of the adapted layers are trained, or ``"all"`` for those of the whole model.
        rank_pattern: Initial rank by name or regular expression, for the layers that differ; the first match counts.
            Letters, digits, dashes and dots are a name.
            A rank above ``max_rank`` raises the cap of those layers to it.
        probes: Columns allocated for every adapter beside ``max_rank``, at least 0, that gather what the gradient asks
            for outside of the adapter's bases and take no part in the forward; see :class:`~geolora_pl.GeoLoRALayer`.
            With 0 a rank grows only by the directions that a step itself brings, as in Algorithm 1 of GeoLoRA.

    Raises:
        ValueError: An argument is out of range, or is the name of a setting of PEFT, such as ``r``; the message says
            what it is called here.

    Example:
        >>> AdapterConfig(target_modules=["query", "value"], rank_pattern={"value": 8}).init_rank
        2
    """

    init_rank: int = 2
    max_rank: int = 16
    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] = ()
    modules_to_save: Sequence[str] = ()
    alpha: float = 1.0
    dropout: float = 0.0
    train_bias: bool | Literal["all"] = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    probes: int = 2

    def __post_init__(self) -> None:
        self._check_ranks()
        self._check_names()
        if not (_is_number(self.alpha) and math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha={self.alpha!r} must be a finite number above 0")
        if not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            raise ValueError(f"dropout={self.dropout!r} must lie in [0, 1)")
        if self.train_bias not in (True, False, "all"):
            raise ValueError(f"train_bias={self.train_bias!r} must be true, false or 'all'")

    def _check_ranks(self) -> None:
        _check_whole("max_rank", self.max_rank, 1)
        _check_whole("init_rank", self.init_rank, 1)
        if self.init_rank > self.max_rank:
            raise ValueError(
                f"init_rank={self.init_rank} is above max_rank={self.max_rank}: lower init_rank or raise max_rank"
            )
        _check_whole("probes", self.probes, 0)
        if not isinstance(self.rank_pattern, Mapping):
            raise ValueError(f"rank_pattern={self.rank_pattern!r} must map names or regular expressions to ranks")
        for pattern, rank in self.rank_pattern.items():
            _check_expression("rank_pattern", pattern)
            _check_whole(f"rank_pattern[{pattern!r}]", rank, 1)

    def _check_names(self) -> None:
        if not self.target_modules:
            raise ValueError(f"target_modules={self.target_modules!r} is empty: name layers, or use 'all-linear'")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(expression := getattr(self, name), str):
                _check_expression(name, expression)
        if isinstance(self.modules_to_save, str) or not isinstance(self.modules_to_save, Sequence):
            raise ValueError(f"modules_to_save={self.modules_to_save!r} must be a list of names")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_expression(name: str, expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(
            f"{name}={expression!r} is not a regular expression: {error}; a list holds plain names"
        ) from error


def _check_whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
