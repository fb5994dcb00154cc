"""What is checked before a run begins: the trainer's settings and company, and the test that it ends with."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy


def check_company(trainer: L.Trainer, small_checkpoints: bool) -> None:
    """Refuse strategies, precisions and callbacks that do not go together with adapters.

    Raises:
        ValueError: There is such a one.
    """
    sharded = isinstance(trainer.strategy, ModelParallelStrategy)
    if sharded and small_checkpoints:
        raise ValueError("small_checkpoints=True: ModelParallelStrategy cannot load such checkpoints: set it to false")
    if sharded and getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ValueError(
            "precision='16-mixed': with ModelParallelStrategy each process would see overflows of its own: take "
            "bf16-mixed"
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by the callback connector
        if isinstance(callback, (StochasticWeightAveraging, WeightAveraging)):
            raise ValueError(
                f"{type(callback).__name__} averages the orthonormal factors U and V entry by entry, which breaks "
                "them: remove it, or merge the adapters before weights are averaged"
            )
