"""What a fit leaves in its callback does not reach the next one."""

import lightning as L
import pytest
import torch
from foreign import ADAPTER, Foreign, loader, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from geolora_pl import AdapterConfig, GeoLoRACallback, inject_adapters
from geolora_pl.adapters.inject import find_adapters


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint after 30 steps with a cadence of 3."""
    runs = trainer(GeoLoRACallback(adapter=ADAPTER), max_epochs=5)
    runs.fit(Foreign(), loader())
    runs.save_checkpoint(tmp_path / "first.ckpt")
    return tmp_path / "first.ckpt"


def test_a_fit_after_the_test_of_a_checkpoint_starts_at_its_own_beginning(checkpoint):
    callback = GeoLoRACallback(adapter=ADAPTER)
    trainer(callback).test(Foreign(), loader(), ckpt_path=checkpoint, weights_only=True, verbose=False)
    trainer(callback).fit(Foreign(), loader())
    assert (callback.integrator.total_steps, callback.integrator.adapt_every) == (6, 1)
    assert callback.monitor.steps[0] == 0


def test_a_fit_after_a_refused_test_starts_at_its_own_beginning(checkpoint):
    class Broken(Foreign):
        def test_step(self, batch, batch_idx):
            raise KeyError("broken")

    callback = GeoLoRACallback(adapter=ADAPTER)
    with pytest.raises(KeyError, match="broken"):
        trainer(callback).test(Broken(), loader(), ckpt_path=checkpoint, weights_only=True, verbose=False)
    trainer(callback).fit(Foreign(), loader())
    assert callback.integrator.total_steps == 6


def test_a_test_of_the_best_checkpoint_does_not_set_back_a_fit_that_goes_on(tmp_path):
    module, callback = Foreign(), GeoLoRACallback(adapter=ADAPTER)
    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    runs = trainer(callback, saved)
    runs.fit(module, loader())
    state = {name: value.clone() for name, value in module.state_dict().items()}
    runs.test(module, loader(), ckpt_path=tmp_path / "step=3.ckpt", weights_only=True, verbose=False)
    module.load_state_dict(state)
    runs.fit_loop.max_epochs = 2
    runs.fit(module, loader())
    assert callback.integrator.total_steps == 12


def test_the_results_of_a_fit_stay_readable_while_another_module_is_tested(checkpoint):
    callback = GeoLoRACallback(adapter=ADAPTER)
    assert callback.integrator is None
    assert callback.monitor is None
    module = Foreign()
    trainer(callback).fit(module, loader())
    trainer(callback).test(Foreign(), loader(), ckpt_path=checkpoint, weights_only=True, verbose=False)
    assert callback.integrator.adapters == find_adapters(module)
    assert callback.integrator.total_steps == callback.monitor.steps[-1] + 1 == 6


class Seeded(Foreign):
    """A module whose base depends on a seed."""

    def __init__(self, seed):
        super().__init__()
        for layer in (self.body[0], self.body[2]):
            nn.init.constant_(layer.weight, seed / 10)


@pytest.mark.parametrize("last", ["fit", "validate"])
def test_a_small_checkpoint_of_a_second_module_belongs_to_its_own_base(tmp_path, last):
    callback = GeoLoRACallback(adapter=ADAPTER, small_checkpoints=True)
    first = trainer(callback)
    first.fit(Seeded(1), loader())
    first.save_checkpoint(tmp_path / "first.ckpt")
    second = Seeded(2)
    runs = trainer(callback)
    getattr(runs, last)(second, loader())
    runs.save_checkpoint(tmp_path / "second.ckpt")
    fresh = Seeded(2)
    trainer(GeoLoRACallback(adapter=ADAPTER)).test(
        fresh, loader(), ckpt_path=tmp_path / "second.ckpt", weights_only=True, verbose=False
    )
    for name, value in second.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name


def test_a_second_module_in_the_same_trainer_has_its_own_cadence():
    callback = GeoLoRACallback(adapter=ADAPTER)
    runs = trainer(callback, max_epochs=5)
    runs.fit(Foreign(), loader())
    assert callback.integrator.adapt_every == 3
    runs.fit_loop.max_epochs = 30
    runs.fit(Foreign(), loader())
    assert callback.integrator.adapt_every == 10
    assert callback.integrator.total_steps == 150


def test_a_cell_of_a_notebook_may_run_twice():
    module, steps = Foreign(), []
    for _ in range(2):
        callback = GeoLoRACallback(adapter=AdapterConfig(**vars(ADAPTER)))
        trainer(callback).fit(module, loader())
        steps.append(callback.integrator.total_steps)
    assert steps == [6, 6]


def test_another_configuration_than_that_of_the_adapters_is_refused():
    module = Foreign()
    trainer(GeoLoRACallback(adapter=ADAPTER)).fit(module, loader())
    with pytest.raises(ValueError, match="say what to adapt in one of the two places"):
        trainer(GeoLoRACallback(adapter=AdapterConfig(init_rank=3))).fit(module, loader())


def test_a_callback_that_has_adapted_one_module_does_not_overlook_the_adapters_of_another():
    callback = GeoLoRACallback(adapter=ADAPTER)
    trainer(callback).fit(Foreign(), loader())
    other = Foreign()
    inject_adapters(other, AdapterConfig(init_rank=3))
    with pytest.raises(ValueError, match="say what to adapt in one of the two places"):
        trainer(callback).fit(other, loader())


def test_a_fit_that_failed_is_no_longer_followed():
    class Fails(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            raise KeyError("stop")

    module, callback = Foreign(), GeoLoRACallback(adapter=ADAPTER)
    runs = trainer(callback, Fails())
    with pytest.raises(KeyError, match="stop"):
        runs.fit(module, loader())
    assert callback.integrator.total_steps == 1
    runs.optimizers[0].step()
    assert callback.integrator.total_steps == 1


def test_the_last_checkpoint_of_a_run_that_was_resumed_for_some_steps_more_has_nothing_pending(tmp_path):
    """Lightning counts a batch too many after such a resume, so that optimizer steps must be counted."""

    def run(path=None, **settings):
        saved = ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False)
        runs = trainer(GeoLoRACallback(adapter=ADAPTER, adapt_every=4), saved, **settings)
        runs.fit(Foreign(), loader(batches=10), ckpt_path=path, weights_only=True if path else None)
        return torch.load(tmp_path / "last.ckpt", weights_only=True)

    run(max_epochs=2)
    end = run(tmp_path / "last.ckpt", max_epochs=-1, max_steps=25)
    assert end["global_step"] == 25
    assert not any(value.any() for name, value in end["state_dict"].items() if name.endswith((".K", ".L")))


def test_a_checkpoint_of_another_module_has_nothing_of_the_run_before_it(tmp_path):
    """A callback follows a fit, and then a trainer that only validates another module saves that one."""
    callback = GeoLoRACallback(adapter=ADAPTER)
    trainer(callback).fit(Foreign(), loader())
    second = trainer(callback)
    second.validate(Foreign(), loader(), verbose=False)
    second.save_checkpoint(tmp_path / "second.ckpt")
    assert not torch.load(tmp_path / "second.ckpt", weights_only=True)["callbacks"].get("GeoLoRACallback")
