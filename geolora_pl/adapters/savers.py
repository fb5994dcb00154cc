"""Warn where another library saves a model with adapters in it, which that library cannot load."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

from torch import nn

from geolora_pl.adapters.base import GeoLoRALayer
from geolora_pl.errors import GeoLoRAWarning

_NAME = "save_pretrained"  # of transformers, of diffusers, and of models that huggingface_hub can save


class _WarnsFirst:
    """The method ``save_pretrained`` of a module, with a warning while there are adapters in it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.__signature__ = inspect.signature(getattr(type(module), _NAME).__get__(module))  # pipelines look at it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(part, GeoLoRALayer) for part in self.module.modules()):
            warnings.warn(
                "save_pretrained writes the adapters under names that from_pretrained does not know, so that their "
                "layers would come back random: merge_adapters(model) first, or save the adapters alone (save_adapter, "
                "export_peft, or push_to_hub of geolora_pl)",
                GeoLoRAWarning,
                stacklevel=2,
            )
        return getattr(type(self.module), _NAME)(self.module, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _WarnsFirst:
        return _WarnsFirst(copy.deepcopy(self.module, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.module, _NAME)  # a model that is pickled, maybe merged, needs nothing of this package


def warn_at_save_pretrained(model: nn.Module) -> None:
    """Let every module of a model that has a method ``save_pretrained`` warn in it, while it has adapters."""
    for module in model.modules():
        if callable(getattr(type(module), _NAME, None)) and _NAME not in vars(module):
            setattr(module, _NAME, _WarnsFirst(module))


def let_save_pretrained(model: nn.Module) -> None:
    """Take the warning back: the adapters are gone, or are saved to be loaded into a model with adapters."""
    for module in model.modules():
        if isinstance(vars(module).get(_NAME), _WarnsFirst):
            delattr(module, _NAME)
