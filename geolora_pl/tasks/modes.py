"""Put a model into evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode, and afterwards each of their modules into the mode that it had.

    Args:
        *models: Any number of them.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with evaluation(model):
        ...     model.training
        False
        >>> [part.training for part in model]
        [True, False]
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
