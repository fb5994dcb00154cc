"""Averaged weights in a fit: what validations, checkpoints, exports and resumed runs see."""

import copy

import lightning as L
import pytest
import torch
from foreign import ADAPTER, Foreign, loader, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from recorded import Recorded
from small import Small
from tolerance import close
from torch import nn

from geolora_pl import (
    AdapterConfig,
    GeoLoRACallback,
    GeoLoRAEMAWeightAveraging,
    inject_adapters,
    load_adapter,
)
from geolora_pl.adapters.inject import find_adapters
from geolora_pl.lightning.export import export
from geolora_pl.lightning.loading import load_module

DECAY = 0.7
FULL = AdapterConfig(10, 10, target_modules=["body.0", "body.2"], modules_to_save=["head"])
# A shuffled validation draws random numbers, and those must not count.
pytestmark = pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled:UserWarning")


class Watched(Recorded):
    """Keeps the plain weights after every step and in every validation."""

    def __init__(self):
        super().__init__()
        self.body.append(nn.BatchNorm1d(8))
        self.seen, self.validations = [], []

    def plain(self):
        weights = {name: layer.weight.detach().clone() for name, layer in find_adapters(self).items()}
        norm = self.body[-1]
        return {**weights, "head": self.head.weight.detach().clone(), "mean": norm.running_mean.clone()}

    def on_train_batch_end(self, *_):
        self.seen.append(self.plain())

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.validations.append(self.plain())


def averaged(states, decay=DECAY):
    mean = dict(states[0])
    for state in states[1:]:
        mean = {name: decay * mean[name] + (1 - decay) * state[name] for name in mean}
    return mean


def fit(folder=None, ckpt_path=None, seed=0, averaging=None, first=False, module=None, more=(), **settings):
    L.seed_everything(seed, verbose=False)
    averaging = averaging or GeoLoRAEMAWeightAveraging(DECAY)
    # At tau=0 and full rank the mean of the updates is the mean of the weights.
    callback = GeoLoRACallback(adapter=FULL, tau=0.0, min_rank=10, adapt_every=4)
    callbacks = [averaging, callback] if first else [callback, averaging]
    saved = [ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)] if folder else []
    module = module or Watched()
    runs = trainer(*callbacks, *more, *saved, **{"max_epochs": 3, **settings})
    runs.fit(module, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return module, runs


def assert_near(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        close(tensor, expected[name], terms=4096)


@pytest.mark.parametrize("first", [False, True], ids=["after", "before"])
def test_validations_and_the_fitted_module_have_the_mean_of_the_weights(first):
    """A user adds the callback, in whatever order, and validates twice per epoch."""
    module, _ = fit(val_check_interval=3, first=first)
    assert len(module.seen) == 18
    for number, found in enumerate(module.validations):
        assert_near(found, averaged(module.seen[: 3 * (number + 1)]))
    assert_near(module.plain(), averaged(module.seen))
    assert module.body[-1].num_batches_tracked == 18


class Thaws(L.Callback):
    """Trains a layer of the base from the second epoch on."""

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            module.body[0].base.requires_grad_(True)


def test_weights_that_a_callback_thaws_are_averaged_from_then_on():
    """A user's callback thawed a layer. Its weights were not averaged, unlike those that were always trained."""
    module, runs = fit(more=[Thaws()])
    assert runs.global_step == len(module.seen)
    assert_near(module.plain(), averaged(module.seen))


def test_training_goes_on_as_without_the_callback():
    """Only what is evaluated changes: losses are those of a run that averages nothing."""
    with_it, _ = fit(val_check_interval=2)
    never = GeoLoRAEMAWeightAveraging(update_starting_at_step=1000)
    without, _ = fit(val_check_interval=2, averaging=never)
    assert with_it.losses == without.losses
    for one, two in zip(with_it.seen, without.seen, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(without.head.weight, without.seen[-1]["head"])


def test_updates_begin_and_come_as_often_as_asked_for():
    module, _ = fit(averaging=GeoLoRAEMAWeightAveraging(0.5, 4, 6, use_buffers=False))
    expected = averaged([module.seen[step] for step in (8, 12, 16)], 0.5)
    assert_near(module.plain(), {**expected, "mean": module.seen[-1]["mean"]})


class Centred(Watched):
    """Keeps a running centre as the code of DINO does: every step puts another tensor in the place of the buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(10))

    def plain(self):
        return {**super().plain(), "centre": self.centre.clone()}

    def training_step(self, batch, batch_idx):
        self.centre = 0.5 * self.centre + 0.5 * batch[0].mean(0)
        return super().training_step(batch, batch_idx)


def test_a_buffer_that_is_replaced_is_averaged_as_well(tmp_path):
    module, runs = fit(module=Centred(), val_check_interval=3)
    for number, found in enumerate(module.validations):
        assert_near(found, averaged(module.seen[: 3 * (number + 1)]))
    assert_near(module.plain(), averaged(module.seen))
    runs.save_checkpoint(tmp_path / "end.ckpt")
    end = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert torch.equal(end["state_dict"]["centre"], module.centre)
    assert torch.equal(end["current_model_state"]["centre"], module.seen[-1]["centre"])


def test_a_checkpoint_holds_both_and_a_resumed_run_equals_one_run(tmp_path):
    whole, runs = fit(tmp_path)
    final = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    for step in (4, 8, 12):
        path = tmp_path / f"step={step}.ckpt"
        checkpoint = torch.load(path, weights_only=True)
        head = checkpoint["current_model_state"]["head.weight"]
        assert torch.equal(head, whole.seen[step - 1]["head"])
        close(checkpoint["state_dict"]["head.weight"], averaged(whole.seen[:step])["head"])
        resumed, _ = fit(tmp_path / "again", path, seed=1)
        assert all(whole.losses[key] == loss for key, loss in resumed.losses.items())
        assert resumed.state_dict().keys() == final.keys()
        assert all(torch.equal(tensor, final[name]) for name, tensor in resumed.state_dict().items())
    runs.save_checkpoint(tmp_path / "end.ckpt")  # after the fit, with the averaged weights in the module
    end = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert torch.equal(end["current_model_state"]["head.weight"], whole.seen[-1]["head"])
    assert torch.equal(end["state_dict"]["head.weight"], final["head.weight"])
    finished, runs = fit(None, tmp_path / "end.ckpt", seed=1)  # which trains nothing
    assert not finished.losses
    assert all(torch.equal(tensor, final[name]) for name, tensor in finished.state_dict().items())
    runs.save_checkpoint(tmp_path / "again.ckpt")
    again = torch.load(tmp_path / "again.ckpt", weights_only=True)
    assert all(torch.equal(tensor, again["state_dict"][name]) for name, tensor in end["state_dict"].items())
    module = Watched()
    with pytest.raises(ValueError, match=r"holds averaged weights, from which training cannot go on"):
        trainer(GeoLoRACallback(adapter=FULL), max_epochs=4).fit(module, ckpt_path=tmp_path / "end.ckpt")


def test_what_is_saved_after_the_fit_is_what_is_in_the_module(tmp_path):
    """A user tested the best checkpoint and saved it under another name: the file held the last average."""
    module, runs = fit(tmp_path)
    trained = module.seen[-1]["head"]
    runs.test(module, loader(), ckpt_path=tmp_path / "step=4.ckpt", weights_only=True, verbose=False)
    runs.save_checkpoint(tmp_path / "best.ckpt")
    best = torch.load(tmp_path / "best.ckpt", weights_only=True)
    tested = torch.load(tmp_path / "step=4.ckpt", weights_only=True)["state_dict"]
    assert tested.keys() == best["state_dict"].keys()
    assert all(torch.equal(tensor, best["state_dict"][name]) for name, tensor in tested.items())
    assert torch.equal(best["current_model_state"]["head.weight"], trained)


@pytest.mark.parametrize("small", [False, True])
def test_test_load_export_and_ranks_take_the_averaged_weights(tmp_path, small):
    torch.manual_seed(0)
    module, averaging = Small(head_lr=0.05), GeoLoRAEMAWeightAveraging(DECAY)
    callback = GeoLoRACallback(tau=0.1, adapt_every=3, budget=300, small_checkpoints=small)
    saved = ModelCheckpoint(tmp_path, "last", every_n_train_steps=12)
    runs = trainer(callback, averaging, saved, max_epochs=2)
    runs.fit(module, loader(), loader())
    x = next(iter(loader()))[0]
    module.eval()
    expected = module.model(x)
    path = tmp_path / "last.ckpt"
    loaded = Small.load_from_checkpoint(path)
    close(loaded.eval().model(x), expected)
    assert callback.integrator.adapter_parameters() <= 300
    assert {name: layer.rank for name, layer in find_adapters(loaded).items()} == callback.integrator.ranks()
    before = runs.callback_metrics["val_loss"]
    assert runs.test(module, loader(), ckpt_path=path, verbose=False)[0]["val_loss"] == pytest.approx(float(before))
    config = tmp_path / "config.yaml"
    config.write_text("model:\n  class_path: small.Small\n")
    export(path, "adapter", tmp_path / "adapter.safetensors", config=config)
    plain = Small().build_model()
    load_adapter(plain, tmp_path / "adapter.safetensors")
    close(plain.eval()(x), expected)
    close(load_module(path, config).model(x), expected)


class Alike(L.Callback):
    def on_validation_epoch_end(self, trainer, module):
        for name, tensor in module.state_dict().items():
            one, two = trainer.strategy.all_gather(tensor.detach())
            assert torch.equal(one, two), name


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:It is recommended to use .self.log:UserWarning")
def test_two_processes_have_one_average(tmp_path):
    start = Watched()
    inject_adapters(start, ADAPTER)

    def again(ckpt_path=None):
        module = copy.deepcopy(start)
        L.seed_everything(0, verbose=False)
        saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
        callbacks = [GeoLoRACallback(tau=0.05, adapt_every=3), GeoLoRAEMAWeightAveraging(DECAY), Alike(), saved]
        runs = trainer(*callbacks, devices=2, strategy="ddp_fork", max_epochs=3)
        runs.fit(module, ckpt_path=ckpt_path, weights_only=True)
        return module.state_dict()

    whole = again()
    resumed = again(tmp_path / "step=4.ckpt")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


class Explodes(Watched):
    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 20:
            self.head.weight.data *= -100
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:the training loss rose:geolora_pl.GeoLoRAWarning")
def test_a_rollback_begins_the_average_again():
    """Weights on the way to divergence have no part in what is evaluated after the run has gone back."""
    module, averaging = Explodes(), GeoLoRAEMAWeightAveraging(0.999)
    callback = GeoLoRACallback(adapter=ADAPTER, tau=0.05, adapt_every=5)
    L.seed_everything(0, verbose=False)
    trainer(callback, averaging, max_epochs=8).fit(module)
    assert callback.integrator.rollbacks == 1
    assert float(module.head.weight.detach().abs().max()) < 2 * float(module.seen[0]["head"].abs().max())


class Stops(Watched):
    def validation_step(self, batch, batch_idx):
        if self.trainer.global_step:
            raise ZeroDivisionError


def test_an_error_in_a_validation_leaves_the_trained_weights():
    module = Stops()
    with pytest.raises(ZeroDivisionError):
        trainer(GeoLoRACallback(adapter=ADAPTER, adapt_every=3), GeoLoRAEMAWeightAveraging()).fit(module)
    assert all(torch.equal(tensor, module.seen[-1][name]) for name, tensor in module.plain().items())


class Untestable(Watched):
    def test_step(self, batch, batch_idx):
        raise ZeroDivisionError


def test_an_error_in_a_test_after_the_fit_leaves_the_averaged_weights():
    """A user interrupts a test after the fit: the weights as they were trained came back, without a word."""
    module, runs = fit(module=Untestable())
    averaged_weights = module.plain()
    with pytest.raises(ZeroDivisionError):
        runs.test(module, loader())
    assert all(torch.equal(tensor, averaged_weights[name]) for name, tensor in module.plain().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": 1.0}, r"decay=1.0 must lie in \[0, 1\)"),
        ({"update_every_n_steps": 0}, "update_every_n_steps=0 must be at least 1"),
        ({"update_starting_at_step": -1}, "update_starting_at_step=-1 must be at least 0"),
    ],
)
def test_arguments_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GeoLoRAEMAWeightAveraging(**settings)


def test_runs_that_cannot_be_averaged_are_refused(tmp_path):
    averaging, callback = GeoLoRAEMAWeightAveraging(), GeoLoRACallback(adapter=ADAPTER)
    with pytest.raises(ValueError, match="the trainer has no GeoLoRACallback"):
        trainer(averaging).fit(Foreign(), loader())
    with pytest.raises(ValueError, match="save_weights_only=True of ModelCheckpoint writes checkpoints without"):
        trainer(callback, averaging, ModelCheckpoint(tmp_path, save_weights_only=True)).fit(Foreign(), loader())
    runs = trainer(callback, averaging)
    runs.strategy.__class__ = ModelParallelStrategy
    with pytest.raises(ValueError, match="GeoLoRAEMAWeightAveraging needs whole weights"):
        averaging.setup(runs, Foreign(), "fit")
