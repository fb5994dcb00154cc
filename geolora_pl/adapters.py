"""The adapter: a frozen linear layer plus a low-rank update that is trained in its tangent space."""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geolora_pl.functional import factored, project_out, working_dtype

FACTORS = ("U", "S", "V", "K", "L")


@dataclass(frozen=True)
class AdapterConfig:
    """What is adapted, and how large the adapters may become.

    Args:
        init_rank: Rank at the start, in [1, max_rank]; the rank found in the end hardly depends on it.
        max_rank: Columns allocated for every adapter, at least 1: the most its rank can become. Cut to the layer's
            smaller side.
        target_modules: ``"all-linear"`` (every linear layer but the task head and ``modules_to_save``), a list of
            names (a module matches by its whole name or its last components), or one regular expression that must
            match the whole name, as in PEFT. A task takes ``"auto"``, too: what suits its model.
        exclude_modules: Names, matched likewise, or one regular expression: never adapted.
        modules_to_save: Names of modules that are trained in full, such as a new head.
        alpha: Constant factor of the update, above 0: ``scaling = alpha``, never a function of the rank. A setting
            ``alpha / r`` of other libraries carries over as ``alpha / r``.
        dropout: Probability that an input of the adapter is dropped in training, in [0, 1).
        train_bias: Whether the biases of the adapted layers are trained, or ``"all"`` for those of the whole model.
        rank_pattern: Initial rank by name or regular expression, for the layers that differ; the first match counts.
            A rank above ``max_rank`` raises the cap of those layers to it.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> AdapterConfig(target_modules=["query", "value"], rank_pattern={"value": 8}).init_rank
        4
    """

    init_rank: int = 4
    max_rank: int = 16
    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] = ()
    modules_to_save: Sequence[str] = ()
    alpha: float = 1.0
    dropout: float = 0.0
    train_bias: bool | Literal["all"] = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_rank("max_rank", self.max_rank)
        _check_rank("init_rank", self.init_rank)
        if self.init_rank > self.max_rank:
            raise ValueError(
                f"init_rank={self.init_rank} is above max_rank={self.max_rank}: lower init_rank or raise max_rank"
            )
        if not (_is_number(self.alpha) and math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha={self.alpha!r} must be a finite number above 0")
        if not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            raise ValueError(f"dropout={self.dropout!r} must lie in [0, 1)")
        if not self.target_modules:
            raise ValueError(f"target_modules={self.target_modules!r} is empty: name layers, or use 'all-linear'")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(expression := getattr(self, name), str):
                _check_expression(name, expression)
        if self.train_bias not in (True, False, "all"):
            raise ValueError(f"train_bias={self.train_bias!r} must be true, false or 'all'")
        if isinstance(self.modules_to_save, str) or not isinstance(self.modules_to_save, Sequence):
            raise ValueError(f"modules_to_save={self.modules_to_save!r} must be a list of names")
        if not isinstance(self.rank_pattern, Mapping):
            raise ValueError(f"rank_pattern={self.rank_pattern!r} must map names or regular expressions to ranks")
        for pattern, rank in self.rank_pattern.items():
            _check_expression("rank_pattern", pattern)
            _check_rank(f"rank_pattern[{pattern!r}]", rank)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_expression(name: str, expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(
            f"{name}={expression!r} is no regular expression: {error}; a list holds plain names"
        ) from error


def _check_rank(name: str, rank: object) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"{name}={rank!r} must be a whole number of at least 1")


class _TangentGradient(torch.autograd.Function):
    """Identity whose backward removes from the gradient of L its part in the span of V.

    The gradients of K and L both contain ``U U^T G V V^T``. Without this projection a step would take that part
    twice, and Algorithm 1 would be missed by exactly it. Here it acts before clipping, reduction and moments.
    """

    @staticmethod
    def forward(ctx: Any, L: Tensor, V: Tensor) -> Tensor:
        ctx.save_for_backward(V)
        return L.view_as(L)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (V,) = ctx.saved_tensors
        with torch.autocast(V.device.type, enabled=False):  # a backward pass may be run inside autocast
            return project_out(grad_outputs[0], V), None


def _with_tangent_gradient(L: Tensor, V: Tensor) -> Tensor:
    return _TangentGradient.apply(L, V)  # type: ignore[no-any-return,no-untyped-call]


# So that an optimizer that is given bare parameters can tell which of them are K and L of one adapter.
_living: weakref.WeakSet[GeoLoRALinear] = weakref.WeakSet()


def adapter_of_factor() -> dict[int, GeoLoRALinear]:
    """Every adapter there is, by the identity of its K."""
    return {id(layer.K): layer for layer in _living}


class GeoLoRALinear(nn.Module):
    r"""A linear layer with a low-rank update in tangent coordinates.

    .. math:: y = W_0 x + b + \alpha \left( (U S + K) V^T + U L^T \right) x

    U (out, R) and V (in, R) are orthonormal in their live columns and zero beyond; U, S, V are frozen parameters that
    only the integrator moves, K (out, R) and L (in, R) are trained. With K = L = 0 the gradients are
    ``alpha G V`` and ``alpha (I - V V^T) G^T U`` for the weight gradient G (out, in), the Riemannian gradient in
    orthonormal coordinates (GeoLoRA, arXiv 2410.18720, without the inverse of S).

    The factors stay float32 (float64 in a float64 model) whatever precision the module is cast to; the products run
    in the precision of the input.

    Attributes:
        rank: The live rank: how many columns of U and V are in use. A plain integer, so that reading it never waits
            for the device.

    Args:
        base: The layer to adapt; frozen here, and its weight never written to.
        config: Ranks, ``alpha``, ``dropout`` and ``train_bias``; ranks are cut to the layer's smaller side.

    Example:
        >>> layer = GeoLoRALinear(nn.Linear(8, 6), AdapterConfig(init_rank=2, max_rank=4))
        >>> layer.rank, tuple(layer.U.shape), tuple(layer.delta_weight().shape)
        (2, (6, 4), (6, 8))
    """

    def __init__(self, base: nn.Linear, config: AdapterConfig) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.scaling = float(config.alpha)
        self.base = base.requires_grad_(False)
        if config.train_bias and base.bias is not None:
            base.bias.requires_grad_(True)
        self.dropout = nn.Dropout(config.dropout) if config.dropout > 0 else nn.Identity()

        m, n = self.out_features, self.in_features
        R = min(config.max_rank, m, n)
        self.rank = min(config.init_rank, R)
        weight = base.weight
        dtype = working_dtype(weight.dtype)

        def zeros(rows: int, *, trained: bool) -> nn.Parameter:
            return nn.Parameter(torch.zeros(rows, R, device=weight.device, dtype=dtype), requires_grad=trained)

        self.U, self.S, self.V = zeros(m, trained=False), zeros(R, trained=False), zeros(n, trained=False)
        self.K, self.L = zeros(m, trained=True), zeros(n, trained=True)
        _living.add(self)
        with torch.no_grad():
            for basis in (self.U, self.V):
                gaussian = torch.randn(len(basis), self.rank, device=weight.device, dtype=dtype)
                basis[:, : self.rank] = torch.linalg.qr(gaussian).Q

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # of a copy, or from a pickle
        _living.add(self)

    @property
    def max_rank(self) -> int:
        """The number of columns allocated."""
        return self.U.shape[1]

    @property
    def weight(self) -> Tensor:
        """The effective weight (out, in), for code that reads ``layer.weight`` instead of calling the layer."""
        weight: Tensor = self.base.weight + self.delta_weight().to(self.base.weight.dtype)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias

    def _factored(self) -> tuple[Tensor, Tensor]:
        return factored(self.U, self.S, self.V, self.K, _with_tangent_gradient(self.L, self.V))

    def delta_weight(self) -> Tensor:
        """The update of the weight, ``alpha ((U S + K) V^T + U L^T)``, (out, in), pending increments included."""
        with torch.autocast(self.U.device.type, enabled=False):
            A, B = self._factored()
            return self.scaling * (A @ B.mT)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x (..., in)."""
        A, B = self._factored()
        coordinates = F.linear(self.dropout(x), B.mT.to(x.dtype))
        y: Tensor = self.base(x) + F.linear(coordinates, (self.scaling * A).to(x.dtype))
        return y

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        for name in FACTORS:  # load_state_dict(assign=True) may have brought them in low precision
            factor = getattr(self, name)
            if factor.dtype != working_dtype(factor.dtype):
                wide = factor.detach().to(working_dtype(factor.dtype))
                setattr(self, name, nn.Parameter(wide, requires_grad=factor.requires_grad))
        self.read_rank()

    def read_rank(self) -> None:
        """Count the live columns of U: the factors themselves are what is saved and loaded of the rank."""
        if not self.U.is_meta:
            self.rank = int((self.U != 0).any(0).sum())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GeoLoRALinear:
        """Move the factors with the module, but never round them on the way (``.half()``, ``bf16-true``)."""

        def keep_precision(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            dtype = working_dtype(result.dtype)
            return result if result.dtype == dtype else tensor.to(result.device, dtype)

        if recurse:
            for child in self.children():
                child._apply(fn)
        super()._apply(keep_precision, recurse=False)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """Shapes and rank, for ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"max_rank={self.max_rank}, scaling={self.scaling}"
        )
