"""A run that is resumed equals the run that was never interrupted, to the bit."""

import random

import lightning as L
import numpy as np
import pytest
import torch
from foreign import ADAPTER, trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from recorded import BATCHES, Noisy, Recorded
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from geolora_pl import GeoLoRACallback, GeoLoRAEMAWeightAveraging, GeoLoRAWarning
from geolora_pl.lightning.exact_resume import TrainingPosition, random_state, set_random_state

# A shuffled validation draws random numbers, and those must not count.
pytestmark = pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled:UserWarning")


def run(folder, ckpt_path=None, module=None, seed=0, **settings):
    """Fit from scratch or go on, from another random state than the first time."""
    L.seed_everything(seed, verbose=False)
    module = module or Recorded()
    checkpoint = {"every_n_epochs": 0, **settings.pop("checkpoint", {})}
    callback = GeoLoRACallback(adapter=ADAPTER, tau=0.05, adapt_every=settings.pop("adapt_every", 2))
    saved = ModelCheckpoint(folder, "{epoch}-{step}", save_top_k=-1, **checkpoint)
    runs = trainer(callback, *settings.pop("callbacks", ()), saved, **{"max_epochs": 3, **settings})
    runs.fit(module, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return module, callback, runs


def everything(module, callback, runs):
    optimizer = runs.optimizers[0].state_dict()["state"]
    moments = {(i, key): value for i, state in optimizer.items() for key, value in state.items()}
    return {**module.state_dict(), **moments}, callback.integrator.state_dict(), callback.integrator.ranks()


def assert_same(resumed, whole):
    assert {step: whole[0].losses[step] for step in resumed[0].losses} == resumed[0].losses
    (tensors, state, ranks), (expected, expected_state, expected_ranks) = everything(*resumed), everything(*whole)
    assert ranks == expected_ranks
    assert state == expected_state
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name


EVERY = {f"after step {n}": {"checkpoint": {"every_n_train_steps": n}} for n in (1, 4, 5, 6, 8)}
AT_THE_END = {
    "after the epoch": {"checkpoint": {"every_n_epochs": 1, "save_on_train_epoch_end": True}},
    "after the validation": {"checkpoint": {"every_n_epochs": 1, "save_on_train_epoch_end": False}},
    "after a validation in mid-epoch": {
        "checkpoint": {"every_n_epochs": 1, "save_on_train_epoch_end": False},
        "val_check_interval": 2,
    },
    # Lightning counted the epoch that had ended twice: a run ended an epoch early, or saw its data in another order.
    "after the epoch, with max_steps": {
        "checkpoint": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
        "max_steps": 15,
        "max_epochs": -1,
    },
    "after the epoch, with both limits": {
        "checkpoint": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
        "max_steps": 100,
    },
}


@pytest.mark.parametrize("settings", [*EVERY.values(), *AT_THE_END.values()], ids=[*EVERY, *AT_THE_END])
@pytest.mark.parametrize("adapt_every", [1, 4])
def test_a_resumed_run_equals_one_run(tmp_path, settings, adapt_every):
    whole = run(tmp_path, adapt_every=adapt_every, **settings)
    assert max(whole[1].integrator.ranks().values()) > ADAPTER.init_rank
    checkpoints = sorted(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    assert len(checkpoints) > 1
    for checkpoint in checkpoints[:4]:
        resumed = run(tmp_path / "again", checkpoint, seed=1, adapt_every=adapt_every, **settings)
        assert resumed[0].losses or checkpoint.name.startswith("epoch=2"), checkpoint
        assert_same(resumed, whole)


def test_a_run_that_max_steps_has_ended_in_mid_epoch_goes_on_with_the_batches_that_are_left(tmp_path):
    settings = {"checkpoint": {"every_n_epochs": 1, "save_on_train_epoch_end": True}, "max_epochs": -1}
    run(tmp_path, max_steps=9, **settings)
    module, callback, _ = run(tmp_path / "again", tmp_path / "epoch=1-step=9.ckpt", max_steps=15, **settings)
    assert [batch for _, batch in module.losses] == [3, 4, 5, 0, 1, 2]
    assert callback.integrator.total_steps == 15


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning")
@pytest.mark.parametrize("automatic", [True, False])
def test_ranks_may_change_as_long_as_in_one_run(tmp_path, automatic):
    """A user resumes from the end of the epoch with which `adapt_until` ends: ranks changed for one more step."""

    class Stepping(Recorded):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = automatic

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if not automatic:
                self.optimizers().zero_grad()
                self.manual_backward(loss)
                self.optimizers().step()
            return loss

    def again(**more):
        module = Stepping()
        callback = GeoLoRACallback(adapter=ADAPTER, tau=0.05, adapt_every=1, adapt_until=0.5)
        L.seed_everything(more.pop("seed", 0), verbose=False)
        saved = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=BATCHES)
        runs = trainer(callback, saved, max_epochs=2)
        runs.fit(module, **more)
        return module, callback, runs

    whole = again()
    assert_same(again(seed=1, ckpt_path=tmp_path / f"step={BATCHES}.ckpt", weights_only=True), whole)


def test_with_workers_and_accumulation(tmp_path):
    def again(*arguments, **more):
        settings = {"accumulate_grad_batches": 2, "checkpoint": {"every_n_train_steps": 4}, "max_epochs": 2}
        return run(*arguments, module=Recorded(workers=1), **settings, **more)

    whole = again(tmp_path)
    resumed = again(tmp_path / "again", tmp_path / "epoch=1-step=4.ckpt", seed=1)
    assert list(resumed[0].losses) == [(1, 2), (1, 3), (1, 4), (1, 5)]
    assert_same(resumed, whole)


def test_a_run_that_was_resumed_is_resumed_again(tmp_path):
    settings = {"checkpoint": {"every_n_train_steps": 2}, "max_epochs": 2}
    whole = run(tmp_path, **settings)
    run(tmp_path / "second", tmp_path / "epoch=1-step=8.ckpt", seed=1, **settings)
    assert_same(run(tmp_path / "third", tmp_path / "second" / "epoch=1-step=10.ckpt", seed=2, **settings), whole)


class Drawing(Recorded):
    """A hook that draws random numbers at the start of every epoch, after the callbacks'."""

    def on_train_epoch_start(self):
        torch.rand(3)


def test_random_numbers_drawn_at_the_start_of_an_epoch(tmp_path):
    settings = {"checkpoint": {"every_n_train_steps": 4}}
    whole = run(tmp_path, module=Drawing(), **settings)
    assert_same(run(tmp_path / "again", tmp_path / "epoch=1-step=8.ckpt", Drawing(), 1, **settings), whole)


class Fails(Recorded):
    """Fails once in the second batch of a validation."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def validation_step(self, batch, batch_idx):
        if self.trainer.global_step == self.step and batch_idx == 1:
            raise ZeroDivisionError
        super().validation_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*(was called without a model|no last checkpoint available):UserWarning")
@pytest.mark.parametrize("averages", [False, True])
@pytest.mark.parametrize("step", [3, 6, 18], ids=["mid-epoch", "end of an epoch", "end of the run"])
def test_a_run_that_was_stopped_in_the_middle_of_a_validation_equals_one_run(tmp_path, step, averages):
    """A validation failed, which draws random numbers, and OnExceptionCheckpoint saved; the user resumes from that."""

    def again(module, *more, **settings):
        averaging = [GeoLoRAEMAWeightAveraging(0.7)] if averages else []
        return run(tmp_path, module=module, callbacks=[*averaging, *more], val_check_interval=3, **settings)

    whole = again(Recorded())
    with pytest.raises(ZeroDivisionError):
        again(Fails(step), OnExceptionCheckpoint(tmp_path, "failed"))
    resumed = again(Recorded(), ckpt_path=tmp_path / "failed.ckpt", seed=1)
    assert len(resumed[0].losses) == 18 - step
    assert_same(resumed, whole)


class Stream(IterableDataset):
    """A stream of unknown length that can be read once."""

    def __init__(self):
        self.samples = iter(Noisy(8 * BATCHES))

    def __iter__(self):
        return self.samples


class Streaming(Recorded):
    def train_dataloader(self):
        return DataLoader(Stream(), 8)


def test_a_stream_loses_no_batch(tmp_path):
    module, _, _ = run(tmp_path, module=Streaming(validated=False), max_epochs=1)
    assert len(module.losses) == BATCHES


class Iterating(Recorded):
    """Takes its batches from the loader itself, an experimental feature of Lightning."""

    def training_step(self, dataloader_iter):
        batch, batch_idx, _ = next(dataloader_iter)
        loss = nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1])
        self.losses[self.trainer.current_epoch, batch_idx] = loss.item()
        return loss


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`:UserWarning")  # that it is experimental
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before:UserWarning")  # ours says why
def test_a_module_that_takes_its_batches_itself_goes_on_exactly_at_the_end_of_an_epoch_alone(tmp_path):
    settings = {"checkpoint": {"every_n_epochs": 1, "save_on_train_epoch_end": True}, "max_epochs": 2}
    whole = run(tmp_path / "whole", module=Iterating(), **settings)
    last = tmp_path / "whole" / f"epoch=0-step={BATCHES}.ckpt"
    assert_same(run(tmp_path / "again", last, Iterating(), 1, **settings), whole)
    settings = {"checkpoint": {"every_n_train_steps": 4}, "max_epochs": 1}
    run(tmp_path, module=Iterating(), **settings)
    with pytest.warns(GeoLoRAWarning, match="takes dataloader_iter: .* begins again at the first batch"):
        resumed, _, runs = run(tmp_path / "mid", tmp_path / "epoch=0-step=4.ckpt", Iterating(), 1, **settings)
    assert len(resumed.losses) == 2
    assert runs.global_step == BATCHES


def test_validation_leaves_no_trace_in_the_random_numbers(tmp_path):
    often, _, _ = run(tmp_path / "often", val_check_interval=2)
    once, _, _ = run(tmp_path / "once")
    assert often.losses == once.losses


def test_random_states_come_back():
    state = random_state()
    expected = [torch.rand(3).tolist(), np.random.rand(), random.random()]  # noqa: NPY002
    set_random_state(state)
    assert [torch.rand(3).tolist(), np.random.rand(), random.random()] == expected  # noqa: NPY002


def test_another_number_of_processes_starts_from_its_own_random_state():
    position = TrainingPosition()
    state = position.state_dict()
    position.load_state_dict({"processes": state["processes"] * 2})
    assert position._restored is None
    position.load_state_dict(state)
    assert position._restored is not None
