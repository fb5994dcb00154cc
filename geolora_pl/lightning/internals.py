"""The only door of this folder to private names of Lightning and jsonargparse.

When an upgrade takes one away, this is the file to change.

``tests/project/test_internals.py`` asks for every one of them by its name, and docs/architecture.md says why each is
needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from jsonargparse import _typehints
from lightning.fabric.utilities.data import _set_sampler_epoch as set_sampler_epoch
from lightning.fabric.utilities.seed import _collect_rng_states as collect_random_states
from lightning.fabric.utilities.seed import _set_rng_states as set_random_states
from lightning.fabric.utilities.types import _PATH as PathLike
from lightning.fabric.utilities.types import _Stateful as Stateful
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loops.fetchers import _DataFetcher as DataFetcher
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher as DataLoaderIterDataFetcher
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher as MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod as restricted_classmethod

__all__ = [
    "DataFetcher",
    "DataLoaderIterDataFetcher",
    "MultiProcessingLauncher",
    "PathLike",
    "Stateful",
    "collect_random_states",
    "restricted_classmethod",
    "set_random_states",
    "set_sampler_epoch",
]


def run_length(trainer: L.Trainer) -> float:
    """The optimizer steps of the run; infinite where Lightning answers -1, as for a data set of unknown length."""
    steps = trainer.estimated_stepping_batches
    return math.inf if steps < 0 else steps


def batches_that_stepped(trainer: L.Trainer) -> int:
    """The batches so far whose end was an optimizer step; Lightning gives this number to the loggers as the step."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def leave_out_hp_metric(trainer: L.Trainer) -> None:
    """Keep from TensorBoard the ``hp_metric`` of -1 that Lightning's own logger would show for every run."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger._default_hp_metric = False


def accumulates(trainer: L.Trainer) -> bool:
    """Whether the gradients of the current batch wait for those of the next."""
    return trainer.fit_loop._should_accumulate()


def logs_this_batch(trainer: L.Trainer) -> bool:
    """Whether the current batch is one of those after which Lightning itself logs."""
    return trainer._logger_connector.should_update_logs


def validates_after_this_batch(trainer: L.Trainer) -> bool:
    """Whether a validation follows the current batch."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def data_of_fit(trainer: L.Trainer) -> tuple[CombinedLoader, DataFetcher]:
    """The data loaders of a fit that has begun, and what takes batches from them."""
    loaders, fetcher = trainer.fit_loop._combined_loader, trainer.fit_loop._data_fetcher
    assert loaders is not None, "Lightning makes the loaders before on_train_start"
    assert fetcher is not None, "Lightning makes the fetcher before on_train_start"
    return loaders, fetcher


def begins_loaders_again(loaders: CombinedLoader) -> bool:
    """Whether one of several data loaders that ends before the others is begun again in the same epoch."""
    return loaders._mode == "max_size_cycle"


def leave_finished_epoch(trainer: L.Trainer) -> None:
    """Let a fit that is resumed from the end of an epoch begin with the next one.

    With ``max_steps`` Lightning takes every epoch of a checkpoint for an unfinished one, ends it once more without a
    batch, and counts it twice.
    """
    fit_loop = trainer.fit_loop
    epoch: Any = fit_loop.epoch_progress.current
    batches: Any = fit_loop.epoch_loop.batch_progress
    # An epoch that was saved after its last batch, and before its end, has just been ended by Lightning itself.
    ended = epoch.ready == epoch.started == epoch.processed and not fit_loop.restarted_mid_epoch
    # Where max_steps has cut an epoch short, it goes on with the batches that are left.
    complete = batches.is_last_batch or batches.current.ready >= fit_loop.max_batches
    if fit_loop.restarting and ended and complete:
        fit_loop.epoch_loop.restarting = False
        fit_loop._restarting = False  # the setter is what asks for max_steps
        fit_loop.reset()


def before_each_epoch(trainer: L.Trainer, call: Callable[[], None]) -> Callable[[], None]:
    """Call a function just before Lightning makes the iterator of an epoch, after all hooks at its start.

    The first epoch of a run is left out, and so is one in whose middle a run is resumed: their iterators are made
    earlier.

    Returns:
        A function that ends this.
    """
    fit_loop = trainer.fit_loop
    loop: Any = fit_loop.epoch_loop
    make_iterator = type(loop).on_run_start

    def on_run_start(fetcher: Any) -> None:
        if trainer.current_epoch > 0 and not fit_loop.is_resuming and not loop.restarting:  # Lightning's own condition
            call()
        make_iterator(loop, fetcher)

    loop.on_run_start = on_run_start

    def stop() -> None:
        del loop.on_run_start

    return stop


def callbacks_of(trainer: L.Trainer) -> list[L.Callback]:
    """The callbacks of a trainer, whose connectors set attributes that its class does not declare."""
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def callbacks_of_fit(module: L.LightningModule) -> list[L.Callback] | None:
    """The callbacks of the fit that a module is in; ``None`` outside of a fit."""
    trainer = module._trainer
    return callbacks_of(trainer) if trainer is not None and trainer.state.fn == TrainerFn.FITTING else None


def datamodule_of(module: L.LightningModule) -> Any:
    """The data module of the trainer that a module belongs to; ``None`` without the one or the other."""
    return getattr(module._trainer, "datamodule", None)


def precision_of(module: L.LightningModule) -> str | None:
    """The precision of the trainer that a module belongs to, such as ``bf16-true``; ``None`` without one."""
    return getattr(module._trainer, "precision", None)


def is_part_in_fit(module: L.LightningModule, trainer: L.Trainer) -> bool:
    """Whether a module is a part of the one that a trainer fits."""
    return trainer.state.fn is TrainerFn.FITTING and trainer.lightning_module is not module


@contextmanager
def classes_by_name(path_of: Callable[[str], str]) -> Iterator[None]:
    """While settings are parsed, say which class is meant where one is looked up by a path or by its name alone.

    Args:
        path_of: It gets the path or name, and returns what is to be looked up in its place.
    """
    original = _typehints.resolve_class_path_by_name
    with replaced_in_parser("resolve_class_path_by_name", lambda base, name: original(base, path_of(name))):
        yield


@contextmanager
def replaced_in_parser(name: str, function: Callable[..., Any]) -> Iterator[None]:
    """For a while, have another function in the place of one of jsonargparse."""
    original = getattr(_typehints, name)
    setattr(_typehints, name, function)
    try:
        yield
    finally:
        setattr(_typehints, name, original)
