import lightning as L
import pytest
import torch
from foreign import Endless, loader, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau
from small import Small
from torch import nn
from torch.utils.data import DataLoader

from geolora_pl import AdapterConfig, GeoLoRACallback, GeoLoRAModule, RiemannianAdam
from geolora_pl.training.schedule import warmup_cosine


def test_a_subclass_needs_only_its_model_and_steps():
    module = Small()
    trainer(GeoLoRACallback(), max_epochs=3).fit(module, loader())
    assert module.model[0].rank > 0
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {
        *(f"model.{i}.{f}" for i in (0, 2) for f in "KL"),
        "model.4.weight",
        "model.4.bias",
    }


def test_a_trainer_without_the_callback_gets_one_and_one_with_keeps_its_own():
    for callbacks in ([], [GeoLoRACallback(tau=0.2)]):
        runs = L.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, accelerator="cpu", callbacks=callbacks)
        module = Small()
        runs.fit(module, loader())
        (callback,) = (c for c in runs.callbacks if isinstance(c, GeoLoRACallback))
        assert callback.integrator.total_steps == 6
        assert callback.integrator.adaptations == 6 + 1  # and at the end
        assert callback.tau == (0.2 if callbacks else 0.3)


def test_a_parameter_of_the_module_itself_is_trained():
    class Tempered(Small):
        def __init__(self):
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(1))

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.model(batch[0]) * self.temperature, batch[1])

    module = Tempered()
    trainer(GeoLoRACallback()).fit(module, loader())
    assert module.temperature != 1


def test_configure_model_is_idempotent():
    module = Small()
    module.configure_model()
    model = module.model
    module.configure_model()
    assert module.model is model


def test_new_modules_join_modules_to_save():
    module = Small(adapter=AdapterConfig(target_modules=["0"], modules_to_save=["3"]))
    module.configure_model()
    assert {name.split(".")[1] for name, p in module.named_parameters() if p.requires_grad} == {"0", "3", "4"}


def test_only_trained_parameters_reach_the_optimizer_with_their_own_lr_and_decay():
    module = Small(
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.2),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
        head_lr=0.01,
    )
    trainer(GeoLoRACallback(), max_steps=1).fit(module, loader())
    optimizer = module.optimizers()
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for p in module.parameters() if p.requires_grad
    }
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.1, 0.2), (0.01, 0.2), (0.01, 0.0)]


@pytest.mark.parametrize(("warmup", "steps"), [(0.25, 3), (3, 3), (0, 0)])
@pytest.mark.parametrize(("head_warmup", "head_steps"), [(1 / 12, 1), (2, 2)])
def test_by_default_riemannian_adam_warms_up_behind_the_head_and_ends_at_zero(warmup, steps, head_warmup, head_steps):
    rates = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, module, *args):
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    module = Small(warmup=warmup, head_warmup=head_warmup)
    trainer(GeoLoRACallback(), Watch(), max_epochs=2).fit(module, loader())
    assert isinstance(module.optimizers(), RiemannianAdam)
    of_groups = [[row[i] for row in rates] for i in range(3)]
    assert of_groups[1] == of_groups[2]
    for of_group, lr, length, power in zip(of_groups, (0.3, 0.001), (steps, head_steps), (2, 1), strict=False):
        assert of_group[:length] == pytest.approx([lr * ((t + 1) / length) ** power for t in range(length)])
        assert max(of_group) == pytest.approx(lr)
        assert of_group[length:] == sorted(of_group[length:], reverse=True)
        assert of_group[-1] < 0.1 * lr


@pytest.mark.parametrize("resumed", [False, True])
def test_the_schedule_of_a_second_fit_with_one_trainer_is_that_of_one_long_fit(resumed, tmp_path):
    """A user raises max_epochs and fits again: the schedule began anew, for the steps of both fits together, and the
    run ended at .7 of its learning rate."""

    class Watch(L.Callback):
        def __init__(self):
            self.rates = []

        def on_train_batch_start(self, trainer, module, *args):
            self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    one, two, saved = Watch(), Watch(), ModelCheckpoint(tmp_path, save_last=True)
    trainer(GeoLoRACallback(), one, max_epochs=4).fit(Small(), loader())
    module, runs = Small(), trainer(GeoLoRACallback(), two, saved, max_epochs=2)
    runs.fit(module, loader())
    runs.fit_loop.max_epochs = 4
    runs.fit(module, loader(), ckpt_path=saved.last_model_path if resumed else None, weights_only=True)
    begun = 13 if resumed else 12  # a resumed fit begins with the rate of its checkpoint
    assert two.rates[begun:] == [pytest.approx(row) for row in one.rates[begun:]]
    assert module.optimizers().param_groups[0]["lr"] == 0


def test_a_run_of_unknown_length_still_learns():
    module = Small(warmup=2)
    before = {}

    class Watch(L.Callback):
        def on_train_start(self, trainer, module):
            before["head"] = module.model[4].weight.clone()

    trainer(GeoLoRACallback(), Watch(), max_epochs=2).fit(module, DataLoader(Endless(), batch_size=8))
    assert not torch.equal(module.model[4].weight, before["head"])
    assert module.optimizers().param_groups[0]["lr"] == pytest.approx(0.3)


def test_parameters_that_are_not_marked_as_adapters_warm_up_as_they_do():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = warmup_cosine(optimizer, warmup=4, total_steps=10, head_warmup=2)
    assert schedule.get_last_lr() == [1 / 16]


def test_a_run_without_an_end_stays_at_its_lr():
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "adapters": True}], lr=1.0)
    schedule = warmup_cosine(optimizer, 2, float("inf"))
    rates = []
    for _ in range(4):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert rates == [0.25, 1.0, 1.0, 1.0]


class Thaw(L.pytorch.callbacks.BaseFinetuning):
    """Trains the bias of a base layer too from the second epoch on, as ``BackboneFinetuning`` would."""

    def freeze_before_training(self, pl_module):
        pass

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            bias = pl_module.model[0].base.bias
            bias.requires_grad_()
            optimizer.add_param_group({"params": [bias], "lr": 0.01})


def test_weights_that_a_callback_thaws_in_mid_run_follow_the_usual_schedule(tmp_path):
    """The next step ended in torch's own error: zip() argument 2 is shorter than argument 1."""
    module = Small()
    runs = trainer(GeoLoRACallback(), Thaw(), max_epochs=3)
    runs.fit(module, loader())
    assert module.optimizers().param_groups[-1]["lr"] == 0.0, "it has come down with the others"
    runs.save_checkpoint(tmp_path / "thawed.ckpt")
    assert torch.load(tmp_path / "thawed.ckpt", weights_only=True)["lr_schedulers"], "no function is in it"
    with pytest.raises(ValueError, match="or resume from before a callback had thawed it"):
        trainer(GeoLoRACallback(), Thaw(), max_epochs=4).fit(Small(), loader(), ckpt_path=tmp_path / "thawed.ckpt")


def test_a_group_that_comes_later_goes_on_from_its_own_learning_rate_also_after_a_resume():
    def run(steps):
        optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "adapters": True}], lr=1.0)
        schedule = warmup_cosine(optimizer, 0, total_steps=12)
        for _ in range(steps):
            optimizer.step()
            schedule.step()
        optimizer.add_param_group({"params": [torch.zeros(1)], "lr": 0.3})
        return optimizer, schedule

    def rates(optimizer, schedule, steps):
        found = []
        for _ in range(steps):
            optimizer.step()
            schedule.step()
            found.append(schedule.get_last_lr())
        return torch.tensor(found, dtype=torch.float64)

    optimizer, schedule = run(4)
    first, second = rates(optimizer, schedule, 8).T
    assert torch.allclose(second, 0.3 / 0.75 * first, rtol=1e-12), "the cosine is .75 after a third of the run"
    optimizer, schedule = run(4)
    before = rates(optimizer, schedule, 3)
    state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    again, its_schedule = run(0)
    again.load_state_dict(state["optimizer"])
    its_schedule.load_state_dict(state["schedule"])
    after = rates(again, its_schedule, 5)
    assert torch.equal(torch.cat([before, after]), torch.stack([first, second], 1))


def late_rates(at, warmup, changed=None):
    """The learning rates, from its first step on, of a group of rate .3 that comes after some of 12 steps."""
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "adapters": True}], lr=1.0)
    schedule = warmup_cosine(optimizer, warmup, total_steps=12, head_warmup=warmup)
    found = []
    for step in range(12):
        if step == at:
            optimizer.add_param_group({"params": [torch.zeros(1)], "lr": 0.3})
        if step == changed:
            optimizer.param_groups[-1]["lr"] *= 2
        found.append(optimizer.param_groups[-1]["lr"])
        optimizer.step()
        schedule.step()
    return found[at:]


def test_a_group_that_comes_during_the_warm_up_does_not_rise():
    """Before the first step the warm-up is at a fifth, and a group that came then rose to five times its rate."""
    rates = late_rates(0, warmup=5)
    assert rates[0] == max(rates) == 0.3
    assert rates[-1] < 0.01


def test_a_rate_that_a_callback_changes_later_stays_changed():
    """``BackboneFinetuning`` raises the rate of what it has thawed every epoch: the next step took it back."""
    usual, changed = late_rates(2, warmup=0), late_rates(2, warmup=0, changed=6)
    assert changed == pytest.approx(usual[:4] + [2 * rate for rate in usual[4:]], rel=1e-12)


def test_schedulers_step_every_optimizer_step_and_plateau_every_epoch():
    module = Small(lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=12))
    trainer(GeoLoRACallback(), max_epochs=2).fit(module, loader())
    assert module.lr_schedulers().last_epoch == 12
    module = Small(lr_scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, monitor="val_loss", patience=0))
    trainer(GeoLoRACallback(), max_epochs=2).fit(module, loader(), loader())


def test_load_from_checkpoint_at_changed_ranks(tmp_path):
    config = AdapterConfig(init_rank=1, max_rank=4, target_modules=["0", "2"], rank_pattern={"0": 2})
    module = Small(width=14, adapter=config)
    trainer(GeoLoRACallback(tau=0.01), ModelCheckpoint(tmp_path, save_last=True), max_epochs=2).fit(module, loader())
    loaded = Small.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert loaded.adapter == config
    assert [loaded.model[i].rank for i in (0, 2)] == [module.model[i].rank for i in (0, 2)]
    x = torch.randn(3, 10)
    assert torch.equal(loaded.model(x), module.model(x))


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    trainer(GeoLoRACallback(), ModelCheckpoint(tmp_path, save_last=True)).fit(Small(), loader())
    with pytest.raises(ValueError, match=r"the weights do not fit this Small: model\.0"):
        Small.load_from_checkpoint(tmp_path / "last.ckpt", width=9)
    with pytest.raises(ValueError, match=r"model\.0\.U is \(12, 12\) there and \(12, 5\) here"):
        Small.load_from_checkpoint(tmp_path / "last.ckpt", adapter=AdapterConfig(init_rank=1, max_rank=3))
    for other, message in (({"max_rank": 3, "init_rank": 1}, "max_rank=3"), ({"alpha": 2.0}, "alpha=2.0")):
        resumed = Small(adapter=AdapterConfig(**other))
        with pytest.raises(ValueError, match=rf"adapter.{message} does not fit the checkpoint, which was made with 1"):
            trainer(GeoLoRACallback(), max_epochs=2).fit(resumed, loader(), ckpt_path=tmp_path / "last.ckpt")


def test_without_build_model_the_message_says_what_to_write():
    class Nothing(GeoLoRAModule):
        pass

    with pytest.raises(NotImplementedError, match=r"Nothing must define build_model\(\)"):
        Nothing().configure_model()


def test_learning_rates_out_of_range_are_refused():
    with pytest.raises(ValueError, match="warmup=-1"):
        Small(warmup=-1)
    with pytest.raises(ValueError, match="head_lr=0"):
        Small(head_lr=0)
