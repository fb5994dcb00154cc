"""The kinds of layers that can be adapted: linear layers, Conv1D, convolutions and embeddings."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geolora_pl.adapters.base import GeoLoRALayer, standard_normal
from geolora_pl.adapters.fused import fused_linear
from geolora_pl.adapters.internals import convolve, has_hooks, is_transformed
from geolora_pl.math.precision import autocast_dtype, exact_products, without_autocast

_LINEAR = nn.Linear.forward  # the forward of torch itself, in case the class is patched later


class GeoLoRALinear(GeoLoRALayer):
    r"""A linear layer with a low-rank update in tangent coordinates.

    .. math:: y = W_0 x + b + \alpha \left( (U S + K) V^T + U L^T \right) x

    The weight of the base may be quantised: only the forward of the base is used then, and ``in_features``,
    ``out_features`` and ``bias``. Merged, such a layer becomes a plain ``nn.Linear`` that is no longer quantised.

    Args:
        base: The layer to adapt, an ``nn.Linear`` or alike.
        config: Ranks, ``alpha``, ``dropout`` and ``train_bias``.

    Example:
        >>> from geolora_pl import AdapterConfig
        >>> layer = GeoLoRALinear(nn.Linear(8, 6), AdapterConfig(init_rank=2, max_rank=4))
        >>> layer.rank, layer.probes, tuple(layer.U.shape), tuple(layer.delta_weight().shape)
        (2, 2, (6, 6), (6, 8))
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x (..., in)."""
        if not self._is_fusible():
            return super().forward(x)
        weight, bias, dtype = self.to_matrix(self.base.weight), self.base.bias, autocast_dtype(x)
        if dtype is not None:
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        with without_autocast(x.device):
            return fused_linear(x, weight, bias, self._live_factors(), self.scaling)

    @staticmethod
    def to_matrix(weight: Tensor) -> Tensor:
        """The weight of the layer as a matrix (out, in), not copied; overridden together with ``from_matrix``."""
        return weight

    @staticmethod
    def _has_known_forward(base: nn.Module) -> bool:
        """Whether the forward of the class is known to be ``W x + b``, and not overridden by a subclass or a patch."""
        return type(base).forward is _LINEAR

    def _is_fusible(self) -> bool:
        """Whether weight and bias say all that the layer does, so that its forward need not be called."""
        base = self.base
        return (
            self._has_known_forward(base)
            and "forward" not in base.__dict__
            and not has_hooks(base)
            and not base.weight.requires_grad
            and not (self.training and isinstance(self.dropout, nn.Dropout))
            and not self.is_quantised(base)
            and not is_transformed()
        )

    @classmethod
    def is_quantised(cls, base: nn.Module) -> bool:
        """Whether the weight is missing or does not hold plain numbers: packed, of few bits, or a tensor subclass."""
        weight = getattr(base, "weight", None)
        return (
            not _is_plain(weight)
            or weight.dim() != 2
            or cls.to_matrix(weight).shape != cls.matrix_shape(base)
            or type(weight).dequantize is not Tensor.dequantize
        )

    def base_weight(self) -> Tensor:
        """The frozen weight in the layout of the layer; that of a quantised layer is its forward of the unit vectors.

        This works without knowing any library of quantised layers.
        """
        if not self.is_quantised(self.base):
            return super().base_weight()
        if (reason := self.refusal(self.base)) is not None:  # the base was not quantised when it got its adapter
            raise ValueError(f"the layer {reason}")
        weight = getattr(self.base, "weight", None)
        like = next((p for p in (weight, self.bias) if _is_plain(p)), None)
        dtype = torch.get_default_dtype() if like is None else like.dtype
        with torch.no_grad(), exact_products(self.U.device):
            columns: Tensor = self.base(torch.eye(self.in_features, dtype=dtype, device=self.U.device))
            return (columns if self.bias is None else columns - self.bias).mT.contiguous().to(dtype)

    def plain(self, weight: Tensor) -> nn.Module:
        """Return the base with this weight; a quantised base is replaced by a new ``nn.Linear``."""
        if not self.is_quantised(self.base):
            return super().plain(weight)
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach(), requires_grad=self.bias.requires_grad)
        return layer.train(self.training)


class GeoLoRAConv1D(GeoLoRALinear):
    """The adapter of transformers' ``Conv1D``, of which GPT-2 is made: a linear layer with the weight (in, out)."""

    @classmethod
    def refusal(cls, base: nn.Module) -> str | None:
        """Refuse a quantised one: merged, it would have to become a linear layer with the transposed weight."""
        if not cls.is_quantised(base):
            return super().refusal(base)
        return "is a Conv1D with a quantised weight: add it to exclude_modules, or make it an nn.Linear first"

    @staticmethod
    def matrix_shape(base: Any) -> tuple[int, int]:
        """Return the transpose of the weight's shape."""
        rows, columns = base.weight.shape
        return columns, rows

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Transpose (out, in) to (in, out)."""
        return matrix.mT

    @staticmethod
    def to_matrix(weight: Tensor) -> Tensor:
        """Transpose (in, out) to (out, in)."""
        return weight.mT

    @staticmethod
    def _has_known_forward(base: nn.Module) -> bool:
        """Whether the forward was written in that library, which may not be imported here.

        Its globals tell, for ``functools.wraps`` copies the name of a module into a patch, but not those.
        """
        written_in = getattr(type(base).forward, "__globals__", {}).get("__name__")
        return bool(written_in == "transformers.pytorch_utils")


class GeoLoRAConv2d(GeoLoRALayer):
    """The adapter of a convolution by its matrix unfolding, out x (in / groups * kernel height * kernel width).

    The update is a convolution with the same geometry to 2 (p + R) channels per group, and one of size 1 from them.

    Example:
        >>> from geolora_pl import AdapterConfig
        >>> layer = GeoLoRAConv2d(nn.Conv2d(3, 8, kernel_size=3), AdapterConfig())
        >>> tuple(layer.delta_weight().shape), tuple(layer.weight.shape)
        ((8, 27), (8, 3, 3, 3))
    """

    is_linear = False

    @classmethod
    def refusal(cls, base: nn.Module) -> str | None:
        """Refuse a subclass that convolves in its own way."""
        return super().refusal(base) or _refuse_own_forward(base, nn.Conv2d, "forward", "_conv_forward")

    def sample_inputs(self, dtype: torch.dtype) -> Tensor:
        """Eight images that are large enough for the kernel and for every kind of padding."""
        base = self.base
        padding = (0, 0) if isinstance(base.padding, str) else base.padding
        size = (d * (k - 1) + 1 + p for d, k, p in zip(base.dilation, base.kernel_size, padding, strict=True))
        return standard_normal((8, base.in_channels, *size), dtype).to(self.U.device)

    @staticmethod
    def matrix_shape(base: Any) -> tuple[int, int]:
        """Return the shape of the unfolding."""
        return base.weight.shape[0], base.weight[0].numel()

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Reshape (out, in / groups * height * width) to (out, in / groups, height, width)."""
        return matrix.reshape(self.base.weight.shape)

    def apply_update(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Convolve with B, then take the linear combinations A of its channels, group by group."""
        groups = self.base.groups
        kernels = B.mT.reshape(-1, *self.base.weight.shape[1:]).repeat(groups, 1, 1, 1)
        coordinates = convolve(self.base, self.dropout(x), kernels.to(x.dtype))
        return F.conv2d(coordinates, A[:, :, None, None].to(x.dtype), groups=groups)


class GeoLoRAEmbedding(GeoLoRALayer):
    """The adapter of an embedding; its matrix is (dim, num), since a row of the table is the image of a unit vector.

    The row of ``padding_idx`` gets no update, as it gets no gradient. In training, dropout acts on whole rows, since a
    unit vector has one entry that can be dropped.

    Example:
        >>> from geolora_pl import AdapterConfig
        >>> layer = GeoLoRAEmbedding(nn.Embedding(10, 4), AdapterConfig())
        >>> tuple(layer.delta_weight().shape), layer(torch.tensor([1, 2])).shape
        ((4, 10), torch.Size([2, 4]))
    """

    is_linear = False

    @classmethod
    def refusal(cls, base: nn.Module) -> str | None:
        """Refuse settings that a sum with an update would not honour, and a subclass that looks up in its own way."""
        for name, off in (("max_norm", None), ("scale_grad_by_freq", False), ("sparse", False)):
            if getattr(base, name) != off:
                return (
                    f"has {name}={getattr(base, name)}, which an update beside the table cannot honour: set it to "
                    f"{off}, or leave the layer out of target_modules"
                )
        return super().refusal(base) or _refuse_own_forward(base, nn.Embedding, "forward")

    def sample_inputs(self, dtype: torch.dtype) -> Tensor:
        """The numbers of the first eight rows."""
        return torch.arange(min(8, self.in_features), device=self.U.device)

    @staticmethod
    def matrix_shape(base: Any) -> tuple[int, int]:
        """Return the transpose of the table's shape."""
        return base.embedding_dim, base.num_embeddings

    @property
    def unused_row(self) -> int | None:
        """The row of the table that stands for padding."""
        return self.base.padding_idx  # type: ignore[no-any-return]

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Transpose (dim, num) to (num, dim)."""
        return matrix.mT

    def _factored(self) -> tuple[Tensor, Tensor]:
        A, B = super()._factored()
        if (row := self.unused_row) is not None:
            B[row] = 0  # a retraction may have left rounding errors there
        return A, B

    def apply_update(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Look up the coordinates of each row, then combine the columns of A."""
        dtype = self.base.weight.dtype
        coordinates = F.embedding(x, B).to(dtype)
        if not isinstance(self.dropout, nn.Identity):
            coordinates = coordinates * self.dropout(coordinates.new_ones(*x.shape, 1))
        return F.linear(coordinates, A.to(dtype))


def _refuse_own_forward(base: nn.Module, known: type[nn.Module], *methods: str) -> str | None:
    """Say why a subclass with its own forward is refused: that may scale, pad or normalise what the weight gives."""
    if all(getattr(type(base), method) is getattr(known, method) for method in methods):
        return None
    return (
        f"is a {type(base).__name__} with a forward of its own, which the adapter of {known.__name__} does not know: "
        f"leave it out of target_modules, or register_adapter({type(base).__name__}, ...)"
    )


def _is_plain(tensor: Tensor | None) -> TypeGuard[Tensor]:
    return tensor is not None and tensor.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
