"""The adapter: a frozen layer plus a low-rank update that is trained in its tangent space."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import chain
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from geolora_pl.adapters.config import AdapterConfig
from geolora_pl.adapters.fused import tangent_factored
from geolora_pl.math.decomposition import Factors, computed_columns
from geolora_pl.math.precision import without_autocast, working_dtype
from geolora_pl.math.ranks import RankRule

FACTORS = ("U", "S", "V", "K", "L")


class _Owner(weakref.ref["GeoLoRALayer"]):
    """The adapter that K or L belongs to, as the parameter itself carries it.

    It is held weakly: adapter and parameter would otherwise keep each other, and the model, in memory.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return set, ()  # a parameter that is saved alone belongs to no adapter, and torch.load takes no class of ours


def adapter_of(parameter: Tensor) -> GeoLoRALayer | None:
    """The adapter that has a parameter as its K or L, for an optimizer that is given bare parameters; or ``None``."""
    owner = getattr(parameter, "_geolora_owner", None)
    adapter = owner() if isinstance(owner, _Owner) else None
    if adapter is None or not (parameter is adapter.K or parameter is adapter.L):
        return None  # also of a parameter that another has replaced
    return adapter


class GeoLoRALayer(nn.Module):
    r"""The base of the adapters: a frozen layer and the factors of a low-rank update of its weight.

    Whatever the layer, its weight is seen as a matrix (out, in), and the update is

    .. math:: \Delta W = \alpha \left( (U S + K) V^T + U L^T \right)

    U (out, R) and V (in, R) are orthonormal in their live columns and zero beyond; U, S, V are frozen parameters that
    only the integrator moves, K (out, R) and L (in, R) are trained. With K = L = 0 and the gradient G (out, in) of that
    matrix, the gradients are ``alpha G V`` and ``alpha (I - V V^T) G^T U``, the Riemannian gradient in orthonormal
    coordinates (GeoLoRA, arXiv 2410.18720, without the inverse of S).

    In front of these R columns U, V, K and L have a few more, the *probes*: directions orthogonal to the live ones that
    get gradients and steps as all others do, but take no part in the update. The gradient outside of both bases, which
    no live column sees, gathers there, and the integrator judges by it which directions are worth a rank.

    The factors stay float32 (float64 in a float64 model) whatever precision the module is cast to; the products run
    in the precision of the layer's output.

    A subclass says how the matrix lies in the weight of its kind of layer (:meth:`matrix_shape`, :meth:`from_matrix`)
    and how the update acts on an input (:meth:`apply_update`); the methods here suit a layer
    ``y = W x + b`` with the weight (out, in). :func:`~geolora_pl.register_adapter` makes it known.

    Attributes:
        rank: The live rank: how many columns of U and V are in use. A plain integer, so that reading it never waits
            for the device.
        probes: The number of columns in front of the live ones.
        rule: The rule by which an integrator chooses the rank, for files that are written between two retractions;
            ``None`` before the first integrator.
        is_linear: Class attribute: whether ``target_modules="all-linear"`` takes this kind of layer; others are named.

    Args:
        base: The layer to adapt; frozen here, and its weight never written to.
        config: Ranks, ``alpha``, ``dropout`` and ``train_bias``; ranks are cut to the matrix's smaller side.

    Raises:
        ValueError: This kind of adapter cannot serve the layer.
    """

    is_linear: ClassVar[bool] = True
    rank: int
    rule: RankRule | None = None
    base: Any  # a module, whose attributes depend on its kind

    def __init__(self, base: nn.Module, config: AdapterConfig) -> None:
        super().__init__()
        if (reason := self.refusal(base)) is not None:
            raise ValueError(f"the layer {reason}")
        self.out_features, self.in_features = self.matrix_shape(base)
        self.scaling = float(config.alpha)
        self.base = base.requires_grad_(False)
        if config.train_bias and self.bias is not None:
            self.bias.requires_grad_(True)
        self.dropout = nn.Dropout(config.dropout) if config.dropout > 0 else nn.Identity()

        m, n = self.out_features, self.in_features
        used = n if self.unused_row is None else max(1, n - 1)
        R = min(config.max_rank, m, used)
        self.rank = min(config.init_rank, R)
        self.probes = config.probes
        like = next(chain(base.parameters(), base.buffers()))  # a quantised layer may have no attribute "weight"
        device, dtype = like.device, working_dtype(like.dtype)

        def zeros(rows: int, columns: int, *, trained: bool) -> nn.Parameter:
            return nn.Parameter(torch.zeros(rows, columns, device=device, dtype=dtype), requires_grad=trained)

        whole = self.probes + R
        self.U, self.S, self.V = (zeros(*shape, trained=False) for shape in ((m, whole), (R, R), (n, whole)))
        self.K, self.L = zeros(m, whole, trained=True), zeros(n, whole, trained=True)
        filled = min(self.rank + self.probes, m, used)  # where a side is too small for all, probes stay zero
        with torch.no_grad():
            for basis, row in ((self.U, None), (self.V, self.unused_row)):
                gaussian = torch.randn(len(basis), filled, device=device, dtype=dtype)
                if row is not None:
                    gaussian[row] = 0
                start = self.probes + self.rank - filled
                basis[:, start : start + filled] = torch.linalg.qr(gaussian).Q
                if row is not None:
                    basis[row] = 0  # where the factorisation leaves rounding
        self.train(base.training)  # in a model that is evaluated, dropout is off

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Take a parameter, as every assignment does, and mark it if it is K or L."""
        super().register_parameter(name, param)
        self._mark_factors()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # of a copy, or from a pickle
        self._mark_factors()

    def _mark_factors(self) -> None:
        """Let K and L know their adapter; see :func:`adapter_of`."""
        for name, factor in self.named_parameters(recurse=False):
            if name in ("K", "L"):
                factor._geolora_owner = _Owner(self)  # type: ignore[attr-defined]

    @property
    def max_rank(self) -> int:
        """The number of columns allocated for the live rank."""
        return self.S.shape[1]

    @classmethod
    def refusal(cls, base: nn.Module) -> str | None:
        """Say why this kind of adapter cannot serve a layer, as the end of a sentence about it; ``None`` if it can.

        Here that is a layer which computes its weight or bias. A subclass with reasons of its own asks this one, too.
        """
        name = computed_tensor(base)
        return None if name is None else f"computes its {name} from other tensors, {_made_permanent(base, name)}"

    @staticmethod
    def matrix_shape(base: Any) -> tuple[int, int]:
        """Rows and columns, (out, in), of the matrix that a layer's weight stands for."""
        return base.out_features, base.in_features

    @property
    def unused_row(self) -> int | None:
        """The row of V, one input of the layer, that is never updated and that bases leave out; ``None`` without."""
        return None

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Rearrange a matrix (out, in) into the layout of the layer's weight."""
        return matrix

    def apply_update(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Return what the update ``A B^T``, with A (out, 2 w) and B (in, 2 w), adds to the output for an input x."""
        x = self.dropout(x)
        return F.linear(F.linear(x, B.mT.to(x.dtype)), A.to(x.dtype))

    def sample_inputs(self, dtype: torch.dtype) -> Tensor:
        """Eight inputs of the layer, on its device, on which a merge compares the outputs before and after.

        Args:
            dtype: That of the layer's weight, which the inputs have unless the layer takes integers.
        """
        return standard_normal((8, self.in_features), dtype).to(self.U.device)

    def base_weight(self) -> Tensor:
        """The frozen weight in the layout of the layer, as floating-point numbers."""
        weight: Tensor = self.base.weight
        return weight

    def plain(self, weight: Tensor) -> nn.Module:
        """Return the layer without its adapter, and with this weight instead of its own."""
        weight = weight.contiguous()  # safetensors files need that, and from_matrix may have transposed it
        self.base.weight = nn.Parameter(weight, requires_grad=self.base.weight.requires_grad)
        return self.base  # type: ignore[no-any-return]

    @property
    def weight(self) -> Tensor:
        """The effective weight in the layout of the layer, for code that reads it instead of calling the layer."""
        return self.updated(self.base_weight(), self.delta_weight())

    def updated(self, weight: Tensor, delta: Tensor) -> Tensor:
        """Add an update (out, in) to a weight in the layout of the layer.

        The sum is formed in the precision of the update and rounded once, to that of the weight.
        """
        delta = self.from_matrix(delta)
        return (weight.to(delta.dtype) + delta).to(weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the base, or ``None``."""
        return getattr(self.base, "bias", None)

    def _live_factors(self) -> Factors:
        """U, S, V, K and L without the columns beyond the live rank, where leaving them out saves time."""
        U, S, V, K, L = self.U, self.S, self.V, self.K, self.L
        if torch.compiler.is_compiling():  # all columns, so that a new rank does not compile the forward again
            return U, S, V, K, L
        columns = computed_columns(self.rank, self.max_rank, self.probes)
        if columns == self.max_rank:
            return U, S, V, K, L
        w = self.probes + columns
        return U[:, :w], S[:columns, :columns], V[:, :w], K[:, :w], L[:, :w]

    def _factored(self) -> tuple[Tensor, Tensor]:
        return tangent_factored(*self._live_factors())

    def delta_weight(self) -> Tensor:
        """The update of the weight as a matrix, ``alpha ((U S + K) V^T + U L^T)``, (out, in), pending part included."""
        with without_autocast(self.U.device):  # code that reads ``weight`` calls this inside a forward pass
            A, B = self._factored()
            return self.scaling * (A @ B.mT)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x, shaped as the base takes it."""
        A, B = self._factored()
        y: Tensor = self.base(x) + self.apply_update(x, self.scaling * A, B)
        return y

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self.fit_probes(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for name in FACTORS:  # load_state_dict(assign=True) may have put factors of low precision here
            factor = getattr(self, name)
            if factor.dtype != working_dtype(factor.dtype):
                wide = factor.detach().to(working_dtype(factor.dtype))
                setattr(self, name, nn.Parameter(wide, requires_grad=factor.requires_grad))
        self.read_rank()

    def fit_probes(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Give factors of another number of probes ours, which are zero until the next retraction, in place."""
        factors = [state_dict.get(prefix + name) for name in FACTORS]
        if any(factor is None or factor.dim() != 2 for factor in factors):
            return  # loading them says what is wrong
        probes = state_dict[f"{prefix}U"].shape[1] - state_dict[f"{prefix}S"].shape[1]
        if probes == self.probes or probes < 0:
            return
        for name in ("U", "V", "K", "L"):
            live = state_dict[prefix + name][:, probes:]
            state_dict[prefix + name] = torch.cat([live.new_zeros(len(live), self.probes), live], dim=1)

    def read_rank(self) -> None:
        """Set the rank to the number of live columns of U; only factors are saved, and the rank follows from them."""
        if not self.U.is_meta:
            self.rank = int((self.U[:, self.probes :] != 0).any(0).sum())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GeoLoRALayer:
        """Move the factors with the module, but never round them on the way (``.half()``, ``bf16-true``)."""

        def keep_precision(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            dtype = working_dtype(result.dtype)
            return result if result.dtype == dtype else tensor.to(result.device, dtype)

        if recurse:
            for child in self.children():
                child._apply(fn)
        super()._apply(keep_precision, recurse=False)  # type: ignore[no-untyped-call]
        self._mark_factors()  # which torch may have replaced
        return self

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse ``torch.jit.script``, which calls this and could not compile the layer."""
        raise ValueError(
            "torch.jit.script cannot compile a layer with an adapter: merge_adapters(model) first, or use "
            "torch.export.export or torch.jit.trace"
        )

    def extra_repr(self) -> str:
        """Shapes and rank, for ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"max_rank={self.max_rank}, scaling={self.scaling}"
        )


def computed_tensor(layer: nn.Module) -> str | None:
    """The name of the first of weight and bias that a layer has, but does not store under that name; or ``None``.

    Parametrizations compute it at every access, and the older weight norm, spectral norm and pruning in a hook before
    every forward. Such a tensor has no identity by which layers that share it could be told, and cannot be assigned.
    """
    stored = {name for name, _ in chain(layer.named_parameters(recurse=False), layer.named_buffers(recurse=False))}
    names = (name for name in ("weight", "bias") if name not in stored)
    return next((name for name in names if isinstance(getattr(layer, name, None), Tensor)), None)


def _made_permanent(layer: nn.Module, name: str) -> str:
    """Say how a computed tensor is made a parameter, as the end of a sentence."""
    if is_parametrized(layer, name):
        how = f"torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r})"
    else:
        how = f"torch.nn.utils.remove_weight_norm, remove_spectral_norm, or prune.remove(layer, {name!r})"
    return f"and a merge would have nowhere to write: make it a parameter first ({how}), or add it to exclude_modules"


def standard_normal(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Numbers of the standard normal distribution, on the CPU and always the same; the user's generator stays."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
