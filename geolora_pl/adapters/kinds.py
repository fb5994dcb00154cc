"""The kinds of layers that can be adapted, and the registry through which others join them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geolora_pl.adapters.base import GeoLoRALayer, GeoLoRALinear
from geolora_pl.adapters.config import AdapterConfig


class GeoLoRAConv1D(GeoLoRALinear):
    """The adapter of transformers' ``Conv1D``, of which GPT-2 is made: a linear layer with the weight (in, out)."""

    @classmethod
    def refusal(cls, base: nn.Module) -> str | None:
        """A quantised one: merged it would have to become a linear layer, with the weight the other way round."""
        if not cls._is_quantised(base):
            return None
        return "is a Conv1D with a quantised weight: add it to exclude_modules, or make it an nn.Linear first"

    @staticmethod
    def matrix_shape(base: Any) -> tuple[int, int]:
        """The transpose of the weight's shape."""
        rows, columns = base.weight.shape
        return columns, rows

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """(out, in) to (in, out)."""
        return matrix.mT

    @staticmethod
    def to_matrix(weight: Tensor) -> Tensor:
        """(in, out) to (out, in)."""
        return weight.mT

    @staticmethod
    def _has_known_forward(base: nn.Module) -> bool:
        """By where it was written, for the library may not be imported here; ``functools.wraps`` copies names only."""
        written_in = getattr(type(base).forward, "__globals__", {}).get("__name__")
        return bool(written_in == "transformers.pytorch_utils")


class GeoLoRAConv2d(GeoLoRALayer):
    """The adapter of a convolution by its matrix unfolding, out x (in / groups * kernel height * kernel width).

    The update is a convolution with the same geometry to 2 R channels (a group), and one of size 1 from them.

    Example:
        >>> layer = GeoLoRAConv2d(nn.Conv2d(3, 8, kernel_size=3), AdapterConfig())
        >>> tuple(layer.delta_weight().shape), tuple(layer.weight.shape)
        ((8, 27), (8, 3, 3, 3))
    """

    is_linear = False

    @classmethod
    def refusal(cls, base: nn.Module) -> str | None:
        """A subclass that convolves in its own way."""
        return _refuse_own_forward(base, nn.Conv2d, "forward", "_conv_forward")

    @staticmethod
    def matrix_shape(base: Any) -> tuple[int, int]:
        """The unfolding's."""
        return base.weight.shape[0], base.weight[0].numel()

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """(out, in / groups * height * width) to (out, in / groups, height, width)."""
        return matrix.reshape(self.base.weight.shape)

    def apply_update(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Convolve with B, then take the linear combinations A of its channels, group by group."""
        groups = self.base.groups
        kernels = B.mT.reshape(-1, *self.base.weight.shape[1:]).repeat(groups, 1, 1, 1)
        coordinates = self.base._conv_forward(self.dropout(x), kernels.to(x.dtype), None)
        return F.conv2d(coordinates, A[:, :, None, None].to(x.dtype), groups=groups)


class GeoLoRAEmbedding(GeoLoRALayer):
    """The adapter of an embedding: the matrix is (dim, num), for a row of the table is the image of a unit vector.

    The row of ``padding_idx`` gets no update, as it gets no gradient. In training, dropout acts on whole rows: on the
    one input of the matrix that a unit vector has.

    Example:
        >>> layer = GeoLoRAEmbedding(nn.Embedding(10, 4), AdapterConfig())
        >>> tuple(layer.delta_weight().shape), layer(torch.tensor([1, 2])).shape
        ((4, 10), torch.Size([2, 4]))
    """

    is_linear = False

    def __init__(self, base: nn.Module, config: AdapterConfig) -> None:
        super().__init__(base, config)
        if (row := self.base.padding_idx) is not None:
            with torch.no_grad():  # a basis without it: no column is spent on a row that stays as it is
                self.V[row] = 0
                self.V[:, : self.rank] = torch.linalg.qr(self.V[:, : self.rank]).Q

    @classmethod
    def refusal(cls, base: nn.Module) -> str | None:
        """What a sum with an update would not honour, and a subclass that looks up in its own way."""
        for name, off in (("max_norm", None), ("scale_grad_by_freq", False), ("sparse", False)):
            if getattr(base, name) != off:
                return (
                    f"has {name}={getattr(base, name)}, which an update beside the table cannot honour: set it to "
                    f"{off}, or leave the layer out of target_modules"
                )
        return _refuse_own_forward(base, nn.Embedding, "forward")

    @staticmethod
    def matrix_shape(base: Any) -> tuple[int, int]:
        """The transpose of the table's shape."""
        return base.embedding_dim, base.num_embeddings

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """(dim, num) to (num, dim)."""
        return matrix.mT

    def _factored(self) -> tuple[Tensor, Tensor]:
        A, B = super()._factored()
        if (row := self.base.padding_idx) is not None:
            B[row] = 0  # also where a retraction left rounding
        return A, B

    def apply_update(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Look the coordinates up."""
        dtype = self.base.weight.dtype
        coordinates = F.embedding(x, B).to(dtype)
        if not isinstance(self.dropout, nn.Identity):
            coordinates = coordinates * self.dropout(coordinates.new_ones(*x.shape, 1))
        return F.linear(coordinates, A.to(dtype))


# By class, or by the full name of one whose library is not imported here.
_ADAPTERS: dict[type[nn.Module] | str, type[GeoLoRALayer]] = {
    nn.Linear: GeoLoRALinear,
    nn.Conv2d: GeoLoRAConv2d,
    nn.Embedding: GeoLoRAEmbedding,
    "transformers.pytorch_utils.Conv1D": GeoLoRAConv1D,
}


def register_adapter(layer_class: type[nn.Module], adapter_class: type[GeoLoRALayer]) -> None:
    """Say which adapter a class of layers gets, and its subclasses that have none of their own.

    Args:
        layer_class: The layers.
        adapter_class: Their adapter, a subclass of :class:`GeoLoRALayer`; for layers with ``in_features``,
            ``out_features`` and a forward ``W x + b`` it is :class:`GeoLoRALinear`.

    Raises:
        ValueError: One of them is no such class.

    Example:
        >>> class Projection(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.in_features, self.out_features = 8, 6
        ...         self.weight = nn.Parameter(torch.randn(6, 8))
        ...     def forward(self, x):
        ...         return x @ self.weight.T
        >>> register_adapter(Projection, GeoLoRALinear)
        >>> adapter_class_of(Projection()).__name__
        'GeoLoRALinear'
    """
    for argument, given, wanted in (
        ("layer_class", layer_class, nn.Module),
        ("adapter_class", adapter_class, GeoLoRALayer),
    ):
        if not (isinstance(given, type) and issubclass(given, wanted)):
            raise ValueError(f"{argument}={given!r} must be a subclass of {wanted.__name__}")
    _ADAPTERS[layer_class] = adapter_class


def adapter_class_of(layer: nn.Module) -> type[GeoLoRALayer] | None:
    """The adapter for a layer, by the nearest of its classes that has one; ``None`` if it cannot be adapted."""
    for layer_class in type(layer).__mro__:
        for key in (layer_class, f"{layer_class.__module__}.{layer_class.__qualname__}"):
            if key in _ADAPTERS:
                return _ADAPTERS[key]
    return None


def _refuse_own_forward(base: nn.Module, known: type[nn.Module], *methods: str) -> str | None:
    """An update beside the forward of a subclass might not be one of its weight: it may scale, pad or normalise."""
    if all(getattr(type(base), method) is getattr(known, method) for method in methods):
        return None
    return (
        f"is a {type(base).__name__} with a forward of its own, which the adapter of {known.__name__} does not know: "
        f"leave it out of target_modules, or register_adapter({type(base).__name__}, ...)"
    )
