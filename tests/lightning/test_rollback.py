"""A run that diverges goes back to a good state, and nothing else changes by that."""

import copy

import lightning as L
import pytest
import torch
from foreign import ADAPTER, Foreign, loader, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from recorded import Recorded
from torch import distributed as dist
from torch import nn

from geolora_pl import GeoLoRACallback, GeoLoRAWarning, inject_adapters
from geolora_pl.training import divergence


class Explodes(Recorded):
    """Something breaks the weights before some steps."""

    def __init__(self, at=(20,), by=-100.0, **settings):
        super().__init__(validated=False, **settings)
        self.at, self.by, self.rates = at, by, []

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step in self.at:
            self.head.weight.data *= self.by
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 120)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def run(module, folder=None, ckpt_path=None, on_divergence="rollback", seed=0, more=(), **settings):
    L.seed_everything(seed, verbose=False)
    callback = GeoLoRACallback(adapter=ADAPTER, tau=0.05, adapt_every=5, on_divergence=on_divergence)
    saved = [ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)] if folder else []
    runs = trainer(callback, *more, *saved, **{"max_epochs": 15, **settings})
    runs.fit(module, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return module, callback, runs


def last_loss(module):
    losses = list(module.losses.values())
    return sum(losses[-6:]) / 6


def state(module, callback, runs):
    optimizer = runs.optimizers[0].state_dict()["state"]
    moments = {f"{i}.{key}": value for i, state in optimizer.items() for key, value in state.items()}
    return {**module.state_dict(), **moments}


def assert_equal(one, two):
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def rose():
    return pytest.warns(
        GeoLoRAWarning, match="the training loss rose from .*: the run went back to its state after step"
    )


@pytest.fixture(scope="module")
def healthy():
    """A run in which nothing breaks; the tests only read it."""
    return run(Explodes(at=()))


@pytest.fixture(scope="module")
def rescued():
    """A run that went back once; the tests only read it."""
    with rose():
        return run(Explodes())


def test_a_run_that_explodes_goes_back_and_ends_well(healthy, rescued):
    (fine, _, _), (module, callback, runs) = healthy, rescued
    lost, _, _ = run(Explodes(), on_divergence="ignore")
    assert last_loss(module) < 0.5
    assert last_loss(lost) > 3 * last_loss(fine)
    assert callback.integrator.rollbacks == 1
    assert runs.callback_metrics["geolora/rollbacks"] == 1
    assert callback.integrator.total_steps == runs.global_step == 90


@pytest.mark.parametrize("choice", ["raise", "ignore"])
def test_a_healthy_run_is_the_same_to_the_bit_whatever_is_chosen(healthy, choice):
    assert_equal(state(*healthy), state(*run(Explodes(at=()), on_divergence=choice)))


def test_the_schedule_does_not_undo_the_shorter_steps(rescued):
    module, _, runs = rescued
    before, after = module.rates[:28], module.rates[-30:]
    assert before == pytest.approx([1e-2 * (1 - step / 120) for step in range(28)])
    assert after == pytest.approx([0.5e-2 * (1 - step / 120) for step in range(60, 90)])
    assert runs.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 * (1 - 90 / 120))


def test_raise_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"loss rose from .* by step 28, with the learning rates .*; lower lr by"):
        run(Explodes(), on_divergence="raise")


def test_raise_saves_nothing_after_the_loss_was_judged(tmp_path):
    with pytest.raises(RuntimeError, match="the run has diverged"):
        run(Explodes(at=(22,)), tmp_path, on_divergence="raise", max_epochs=5)
    assert max(int(path.stem.removeprefix("step=")) for path in tmp_path.iterdir()) == 24


class Thaws(L.Callback):
    """Trains a layer of the base from the fourth epoch on."""

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 3:
            layer = module.body[0].base.requires_grad_(True)
            trainer.optimizers[0].add_param_group({"params": list(layer.parameters())})


class ExplodesThawed(Explodes):
    def training_step(self, batch, batch_idx):
        if self.trainer.global_step in self.at:
            self.body[0].base.weight.data *= self.by
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def test_a_run_goes_back_also_where_a_callback_has_thawed_weights_since():
    """A user's run diverged when a part of the base had been thawed, and ended in a KeyError in place of going back."""
    with rose():
        module, callback, _ = run(ExplodesThawed(), more=[Thaws()])
    assert last_loss(module) < 0.5
    assert callback.integrator.rollbacks == 1
    assert module.body[0].base.weight.abs().max() < 2


def test_a_run_that_diverges_again_and_again_ends(monkeypatch):
    monkeypatch.setattr(divergence, "MOST_ROLLBACKS", 1)
    with pytest.raises(RuntimeError, match=r"diverged again after 1 rollbacks.* on_divergence='ignore'"), rose():
        run(Explodes(at=(27, 60)))


def test_weights_that_are_not_finite_go_back_though_every_step_is_skipped():
    with pytest.warns(GeoLoRAWarning) as warned:
        module, callback, _ = run(Explodes(by=float("inf")))
    assert sum("went back" in str(w.message) for w in warned) == 1
    assert callback.integrator.rollbacks == 1
    assert all(p.isfinite().all() for p in module.parameters())


def test_the_end_of_a_run_that_went_back_in_its_last_step_has_nothing_pending():
    with rose():
        module, callback, _ = run(Explodes(at=(80,)), max_epochs=-1, max_steps=88)
    assert callback.integrator.rollbacks == 1
    assert not any(value.any() for name, value in module.state_dict().items() if name.endswith((".K", ".L")))
    assert last_loss(module) > 1
    assert module.head.weight.abs().max() < 5


@pytest.mark.filterwarnings("ignore:the training loss rose:geolora_pl.GeoLoRAWarning")
def test_a_resumed_run_equals_one_run(tmp_path):
    whole = run(Explodes(at=(17, 44)), tmp_path, max_epochs=10)
    assert whole[1].integrator.rollbacks == 2
    for step in (4, 16, 20, 28, 40, 48, 56):  # before, between and after, with losses that wait to be judged
        again = run(Explodes(at=(17, 44)), tmp_path / "again", tmp_path / f"step={step}.ckpt", seed=1, max_epochs=10)
        assert_equal(state(*again), state(*whole))
        assert again[1].integrator.state_dict() == whole[1].integrator.state_dict()
        one, two = (callback._run.guard.state_dict() for _, callback, _ in (again, whole))
        assert_equal(one["good"]["snapshot"]["tensors"], two["good"]["snapshot"]["tensors"])
        assert (one["losses"], one["level"]) == (two["losses"], two["level"])


@pytest.mark.filterwarnings("ignore:the training loss rose:geolora_pl.GeoLoRAWarning")
def test_a_fit_that_goes_on_keeps_what_it_knows():
    module, callback, runs = run(Explodes(at=(27, 92)), max_epochs=15)
    runs.fit_loop.max_epochs = 20
    runs.fit(module)
    assert callback.integrator.rollbacks == 2


class Manual(Explodes):
    def __init__(self, gives_loss=True):
        super().__init__()
        self.automatic_optimization = False
        self.gives_loss = gives_loss

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()
        return loss if self.gives_loss else None


def test_manual_optimization_with_the_loss_that_training_step_returns():
    with rose():
        _, callback, _ = run(Manual())
    assert callback.integrator.rollbacks == 1
    _, callback, _ = run(Manual(gives_loss=False))
    assert callback.integrator.rollbacks == 0


def test_accumulated_batches():
    with rose():
        _, callback, _ = run(Explodes(at=(13,)), accumulate_grad_batches=3)
    assert callback.integrator.rollbacks == 1


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="on_divergence='stop' must be one of rollback, raise, ignore"):
        GeoLoRACallback(on_divergence="stop")


class Alone(Explodes):
    """In the second process alone the loss looks broken."""

    def training_step(self, batch, batch_idx):
        loss = Recorded.training_step(self, batch, batch_idx)
        broken = self.trainer.global_step in range(19, 28) and dist.get_rank() == 1
        return loss + 100 if broken else loss


class Counted(L.Callback):
    def on_train_end(self, trainer, module):
        counts = trainer.strategy.all_gather(torch.tensor(trainer.callbacks[0].integrator.rollbacks))
        weights = trainer.strategy.all_gather(module.head.weight.detach())
        if counts.tolist() != [1, 1] or not torch.equal(weights[0], weights[1]):
            raise AssertionError(counts.tolist())


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:the training loss rose:geolora_pl.GeoLoRAWarning")
@pytest.mark.parametrize("kind", [pytest.param(Explodes, marks=pytest.mark.slow), Alone])
def test_two_processes_decide_alike_and_resume_exactly(tmp_path, kind):
    start = kind(at=(17,))
    inject_adapters(start, ADAPTER)
    settings = {"devices": 2, "strategy": "ddp_fork", "more": [Counted()]}

    def again(ckpt_path=None):
        module = copy.deepcopy(start)
        L.seed_everything(0, verbose=False)
        callback = GeoLoRACallback(tau=0.05, adapt_every=5)
        saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
        runs = trainer(callback, *settings["more"], saved, devices=2, strategy="ddp_fork", max_epochs=15)
        runs.fit(module, ckpt_path=ckpt_path, weights_only=True)
        return module.state_dict()

    whole = again()
    for step in (12, 24):
        assert_equal(again(tmp_path / f"step={step}.ckpt"), whole)


class Normalised(Foreign):
    def __init__(self):
        super().__init__()
        self.body.append(nn.BatchNorm1d(8))

    def training_step(self, batch, batch_idx):
        x, y = batch
        if broken := 29 <= self.trainer.global_step < 33:
            x = x * 1e4
        loss = nn.functional.cross_entropy(self.head(self.body(x)), y)
        return loss * 1e3 if broken else loss


def test_running_statistics_go_back():
    torch.manual_seed(0)
    callback = GeoLoRACallback(adapter=ADAPTER, adapt_every=5)
    module = Normalised()
    with rose():
        trainer(callback, max_epochs=10).fit(module, loader())
    assert module.body[-1].num_batches_tracked == 60 - 20
    assert module.body[-1].running_mean.abs().max() < 2
