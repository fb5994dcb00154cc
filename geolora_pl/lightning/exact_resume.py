"""Where a run stands in its data and its random numbers, so that a resumed run goes on as if nothing had happened."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DistributedSampler, SequentialSampler

from geolora_pl.errors import GeoLoRAWarning
from geolora_pl.lightning.internals import (
    DataFetcher,
    DataLoaderIterDataFetcher,
    Stateful,
    before_each_epoch,
    begins_loaders_again,
    callbacks_of,
    collect_random_states,
    data_of_fit,
    leave_finished_epoch,
    set_random_states,
    set_sampler_epoch,
    validates_after_this_batch,
)
from geolora_pl.training.distributed import gathered, processes, this_process

RandomState = dict[str, Any]


def random_state(generators: Sequence[torch.Generator] = ()) -> RandomState:
    """The states of the random numbers of torch, numpy and Python, as tensors and plain values.

    Args:
        generators: Further generators whose states are kept.
    """
    state = collect_random_states(include_cuda=False)
    kind, keys, *rest = state["numpy"]
    state["numpy"] = (kind, torch.from_numpy(keys.astype(np.int64)), *rest)  # loads with weights_only=True
    state["device"] = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    state["generators"] = [generator.get_state() for generator in generators]
    return state


def set_random_state(state: RandomState, generators: Sequence[torch.Generator] = ()) -> None:
    """Go back to what :func:`random_state` gave."""
    kind, keys, *rest = state["numpy"]
    set_random_states({**state, "numpy": (kind, keys.numpy().astype(np.uint32), *rest)})
    if state["device"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["device"])
    # An older checkpoint holds none, and another data loader may have more or fewer: its data differ anyway.
    for generator, kept in zip(generators, state.get("generators", ()), strict=False):
        generator.set_state(kept)


def generators_of(loaders: Iterable[Any]) -> list[torch.Generator]:
    """The generators from which data loaders and their samplers draw instead of torch's own, each once."""
    found: dict[int, torch.Generator] = {}
    for loader in loaders:
        batches = getattr(loader, "batch_sampler", None)
        for owner in (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
            if isinstance(generator := getattr(owner, "generator", None), torch.Generator):
                found[id(generator)] = generator
    return list(found.values())


def _from_state(set_state: Callable[[], None], batches: Iterator[Any]) -> Iterator[Any]:
    """Give the same batches, and draw the first of them from a random state, whatever has happened since."""
    set_state()
    end = object()
    while (batch := next(batches, end)) is not end:  # "yield from" would start the loader again
        yield batch


def _leave_out(seen: int, fetcher: DataFetcher) -> Callable[[], None]:
    """Draw the batches of an epoch that a run has seen before it was resumed, without using them.

    Returns:
        A function by which Lightning warns again of what is untrue here alone.
    """
    for _ in range(seen):
        next(fetcher)
    fetcher.fetched -= seen  # Lightning adds them
    warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
    ours = warnings.filters[0]

    def warn_again() -> None:
        if ours in warnings.filters:  # and not somebody else's list by now
            warnings.filters.remove(ours)  # type: ignore[attr-defined]  # it is a list

    return warn_again


def _say_what_was_not_seen(seen: int, before: int | None, now: int | None) -> None:
    if before is not None and before != now:
        rank_zero_warn(
            f"the epoch in whose middle this run is resumed had {before} batches and has {now} now, so that the first "
            f"{seen}, which are left out, are not what the run had seen: keep batch_size, the data and the number of "
            "processes as they were, or resume from the end of an epoch",
            category=GeoLoRAWarning,
        )


def _say_what_is_not_exact(trainer: L.Trainer, loaders: Iterable[Any], seen: int) -> None:
    """Warn of what keeps a resumed run from being as one run would have been, and is in no checkpoint."""
    if lost := seen % trainer.accumulate_grad_batches:
        rank_zero_warn(
            f"the checkpoint was saved between two optimizer steps, and the gradients of {lost} accumulated batches "
            "are not in it, so that the next step rests on fewer batches: validate and save after a multiple of "
            f"accumulate_grad_batches={trainer.accumulate_grad_batches} batches for an exact run",
            category=GeoLoRAWarning,
        )
    untold = trainer.fit_loop.restarted_mid_epoch or trainer.fit_loop.restarted_on_epoch_end  # as Lightning asks itself
    schedules = (each for each in callbacks_of(trainer) if isinstance(each, GradientAccumulationScheduler))
    for schedule in schedules if untold else ():
        if (asked := schedule.get_accumulate_grad_batches(trainer.current_epoch)) != trainer.accumulate_grad_batches:
            rank_zero_warn(
                "GradientAccumulationScheduler: Lightning does not tell it that the epoch begins with which this run "
                f"goes on, and so accumulates {trainer.accumulate_grad_batches} batches there and not {asked}: save "
                "with save_on_train_epoch_end=True for an exact run",
                category=GeoLoRAWarning,
            )
    if any(getattr(loader, "persistent_workers", False) for loader in loaders):
        rank_zero_warn(
            "persistent_workers=True: the random numbers of the workers go on from epoch to epoch and are in no "
            "checkpoint, so that this resumed run is exact only if the data set draws none: set persistent_workers to "
            "false for an exact one",
            category=GeoLoRAWarning,
        )
    if every := trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]  # set by the data connector
        rank_zero_warn(
            f"reload_dataloaders_every_n_epochs={every}: Lightning counts the epochs anew from where a run is resumed, "
            "so that this one may see its data in another order: set it to 0 for an exact one",
            category=GeoLoRAWarning,
        )
    if any(config.reduce_on_plateau and config.interval == "epoch" for config in trainer.lr_scheduler_configs):
        rank_zero_warn(
            "ReduceLROnPlateau: no metric is in a checkpoint, and Lightning leaves out the scheduler's step at the end "
            "of the epoch in which it was saved, so that this resumed run may lower its learning rates an epoch later: "
            "use a scheduler that waits for no metric for an exact one",
            category=GeoLoRAWarning,
        )


def _say_what_was_begun_again(loaders: CombinedLoader, seen: int) -> None:
    """Warn of a loader that was begun again from a random state that is not known any more."""
    if not begins_loaders_again(loaders):
        return
    drawn = [length for each in loaders.flattened if (length := sized_len(each)) and not _is_drawn_alone(each)]
    if again := [length for length in drawn if length < seen]:
        rank_zero_warn(
            f"a data loader of {min(again)} batches had ended in the epoch in whose middle this run is resumed, and "
            "was begun again from the random numbers of the training: this resumed run is exact only if such a loader "
            "has a generator of its own (DataLoader(..., generator=torch.Generator()))",
            category=GeoLoRAWarning,
        )


def _is_drawn_alone(loader: Any) -> bool:
    """Whether the order of a data loader does not depend on how many random numbers are drawn elsewhere."""
    is_fixed = isinstance(getattr(loader, "sampler", None), SequentialSampler | DistributedSampler)
    return bool(generators_of([loader])) or (is_fixed and not getattr(loader, "num_workers", 0))


class TrainingPosition:
    """Remembers the random states of each process, and replays an epoch up to the batch that comes next.

    Lightning restarts the data of an epoch in whose middle a run is resumed, and knows nothing of random numbers. Here
    the batches that were seen are drawn again from the random state that they came from, and left out. That is exact
    for every data loader whose order follows from the random state (a ``generator`` of the loader or of its sampler
    included) and the epoch, workers and augmentation included, and costs the time to read them. A batch in whose middle
    a checkpoint was saved comes again, and Lightning goes on with a validation. A loader with a ``state_dict`` of its
    own is left to itself, and so is a module that takes its batches itself (``dataloader_iter``): of an epoch that it
    has begun it sees the first batches again.

    A resumed run may differ from one run, and a warning says so, where workers are persistent and carry their random
    numbers to the next epoch, where a shorter loader without a generator was begun again in the middle of the epoch,
    where the checkpoint was saved between two steps of accumulated gradients, or in the middle of an epoch for which
    there is a schedule of accumulation, where loaders are made again after some epochs, and with ``ReduceLROnPlateau``.
    """

    def __init__(self) -> None:
        self._trainer: L.Trainer | None = None  # from the start of the training on
        self._generators: list[torch.Generator] = []  # of the data loaders
        self._epoch_start: RandomState | None = None  # None where Lightning made the iterator of the epoch
        self._after_batch: RandomState | None = None  # after the last whole batch; None before the first of an epoch
        self._before_validation: RandomState | None = None
        self._restored: RandomState | None = None
        self._batches: int | None = None  # of the epoch; None for a stream of unknown length
        self._stop_watching: Callable[[], None] | None = None
        self._warn_again: Callable[[], None] | None = None

    def train_starts(self, trainer: L.Trainer) -> None:
        """Call when the data loaders are there: go to the batch that comes next."""
        self.close()
        leave_finished_epoch(trainer)
        self._trainer = trainer
        self._generators = generators_of(data_of_fit(trainer)[0].flattened)
        self._stop_watching = before_each_epoch(trainer, self._epoch_begins)
        now, self._restored = self._restored, None
        loaders, fetcher = data_of_fit(trainer)
        before, self._batches = self._batches, fetcher.length
        keeps_its_own_state = any(isinstance(loader, Stateful) for loader in loaders.flattened)
        epoch: Any = trainer.fit_loop.epoch_progress.current
        start, seen = self._beginning(trainer, now, epoch)
        self._epoch_start = None if keeps_its_own_state else start
        self._after_batch = now if seen else None
        self._before_validation = now  # one in whose middle the run was saved goes on before the next batch
        if self._epoch_start is not None:
            self._set_random_state(self._epoch_start)
            for loader in loaders.flattened:
                set_sampler_epoch(loader, epoch.processed)
            iter(fetcher)
        if seen and isinstance(fetcher, DataLoaderIterDataFetcher):
            warnings.warn(
                "training_step takes dataloader_iter: only it knows which batches it has used, so the rest of this "
                "epoch begins again at the first batch; save at the end of an epoch, or let training_step take a batch",
                GeoLoRAWarning,
                stacklevel=2,
            )
        elif seen and not keeps_its_own_state:
            _say_what_was_not_seen(seen, before, self._batches)
            _say_what_was_begun_again(loaders, seen)
            self._warn_again = _leave_out(seen, fetcher)
        if now is not None:
            _say_what_is_not_exact(trainer, loaders.flattened, seen)
            if seen or self._epoch_start is None:
                self._set_random_state(now)
            assert fetcher.iterator is not None, "Lightning or the lines above have made it"
            fetcher.iterator = _from_state(partial(self._set_random_state, self._random_state()), fetcher.iterator)

    def _beginning(self, trainer: L.Trainer, now: RandomState | None, epoch: Any) -> tuple[RandomState | None, int]:
        """The random state to begin this epoch from, unless Lightning begins it, and how many of its batches were seen.

        Args:
            trainer: The trainer.
            now: The random state when the run was saved; ``None`` for a run that begins.
            epoch: Lightning's progress through the epochs.
        """
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress
        if now is None:
            # A stream of unknown length may be readable only once, and Lightning has begun with it.
            return (None if self._batches is None else self._random_state()), 0
        if not self._in_batch and (batches.is_last_batch or batches.current.ready >= trainer.fit_loop.max_batches):
            # Where the hooks at the end of the epoch are still to come, Lightning makes the next iterator after them.
            return (now if epoch.processed == epoch.ready else None), 0
        batches.is_last_batch = False  # it was set when the batch was fetched that now comes again
        return self._epoch_start, batches.current.processed

    def _random_state(self) -> RandomState:
        return random_state(self._generators)

    def _set_random_state(self, state: RandomState) -> None:
        set_random_state(state, self._generators)

    @property
    def _in_batch(self) -> bool:
        """Whether a batch has been fetched whose step is not over, where a checkpoint is being saved or was saved."""
        if self._trainer is None:
            return False
        batches: Any = self._trainer.fit_loop.epoch_loop.batch_progress.current
        return bool(batches.processed < batches.ready)

    def _epoch_begins(self) -> None:
        assert self._trainer is not None, "the training has started"
        loaders, fetcher = data_of_fit(self._trainer)  # loaders may be made again
        self._generators, self._batches = generators_of(loaders.flattened), fetcher.length
        self._epoch_start, self._after_batch = self._random_state(), None

    def close(self) -> None:
        """Call at the end of a run: the trainer makes its iterators by itself again."""
        if self._stop_watching is not None:
            self._stop_watching()
        if self._warn_again is not None:
            self._warn_again()
        self._stop_watching = self._warn_again = None

    def batch_ended(self, trainer: L.Trainer) -> None:
        """Call after every training batch: what follows may be a validation, or a batch that is not finished."""
        self._after_batch = self._random_state()
        self._before_validation = self._after_batch if validates_after_this_batch(trainer) else None

    def validation_ended(self) -> None:
        """Call after a validation: it leaves no trace in the random numbers of the training."""
        if self._before_validation is not None:
            self._set_random_state(self._before_validation)
            self._before_validation = None

    def state_dict(self) -> dict[str, Any]:
        """The states of all processes; every process must call this."""
        now = self._after_batch if self._in_batch else self._before_validation
        mine = {"epoch_start": self._epoch_start, "now": now or self._random_state(), "batches": self._batches}
        return {"processes": gathered(mine)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave, unless another number of processes made it: their data differ."""
        everyone = state["processes"]
        if len(everyone) == processes():
            mine = everyone[this_process()]
            self._epoch_start, self._restored = mine["epoch_start"], mine["now"]
            self._batches = mine.get("batches")  # an older checkpoint does not say it
