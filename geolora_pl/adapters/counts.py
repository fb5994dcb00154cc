"""How many parameters a model with adapters has, by the parts that every summary names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from geolora_pl.adapters.base import FACTORS, GeoLoRALayer
from geolora_pl.adapters.inject import adapter_parameters
from geolora_pl.adapters.quantised import quantised_sizes


@dataclass(frozen=True)
class Counts:
    """The parameters of a model in three parts that do not overlap.

    Attributes:
        adapters: Of the adapters at their ranks now.
        in_full: Of the head and others that are trained in full.
        base: Of the base, which is frozen.
        per_rank: Of the adapters if each had rank 1, the sum of ``in + out``.

    Example:
        >>> print(Counts(adapters=160, in_full=18, base=200, per_rank=32))
        178 parameters: 160 in adapters (80.0% of the base of 200, as a LoRA of rank 5.0) and 18 in full (head...)
    """

    adapters: int
    in_full: int
    base: int
    per_rank: int

    @classmethod
    def of(cls, model: nn.Module, adapters: Mapping[str, GeoLoRALayer]) -> Counts:
        """Count the parameters of a model; codes count as the numbers that they stand for.

        Args:
            model: With adapters, or just merged.
            adapters: Those of the model.
        """
        factors = {id(getattr(layer, name)) for layer in adapters.values() for name in FACTORS}
        own, codes = [p for p in model.parameters() if id(p) not in factors], quantised_sizes(model)
        in_full = sum(p.numel() for p in own if p.requires_grad)
        base = sum(codes.get(id(p), p.numel()) for p in own if not p.requires_grad)
        per_rank = sum(layer.in_features + layer.out_features for layer in adapters.values())
        return cls(adapter_parameters(adapters), in_full, base, per_rank)

    def __str__(self) -> str:
        share = f"{self.adapters / self.base:.1%} of the base of {self.base:,}, " if self.base else ""
        return (
            f"{self.adapters + self.in_full:,} parameters: {self.adapters:,} in adapters ({share}as a LoRA of rank "
            f"{self.adapters / self.per_rank:.1f}) and {self.in_full:,} in full (head and others)"
        )
