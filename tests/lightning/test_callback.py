import csv

import lightning as L
import pytest
import torch
from foreign import ADAPTER, Endless, Foreign, loader, trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from small import Small
from tolerance import is_orthonormal, rounding
from torch import nn
from torch.utils.data import DataLoader

from geolora_pl import (
    GeoLoRACallback,
    GeoLoRAWarning,
    RankAdaptiveIntegrator,
    RiemannianAdam,
    inject_adapters,
)
from geolora_pl.adapters.inject import find_adapters
from geolora_pl.lightning.monitor import RankMonitor


class Built(Foreign):
    """The same, building its layers in configure_model."""

    def __init__(self):
        L.LightningModule.__init__(self)
        self.make = torch.optim.AdamW
        self.calls = 0

    def configure_model(self):
        if not hasattr(self, "body"):
            self.calls += 1
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh())
            self.head = nn.Linear(8, 2)


class Several(Foreign):
    """Three optimizer steps a batch, by hand."""

    def __init__(self, after_step=lambda: None):
        super().__init__()
        self.automatic_optimization = False
        self.after_step = after_step

    def training_step(self, batch, batch_idx):
        for _ in range(3):
            self.optimizers().zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()
            self.after_step()


@pytest.mark.parametrize("module_class", [Foreign, Built])
def test_any_module_gets_adapters_and_moves_them(module_class):
    module, callback = module_class(), GeoLoRACallback(tau=0.01, adapter=ADAPTER)
    trainer(callback).fit(module, loader())
    assert list(find_adapters(module)) == ["body.0", "body.2"]
    assert callback.integrator.total_steps == 6
    assert callback.integrator.adaptations == 6 + 1  # at the end nothing is taken in any more
    assert module.body[0].rank > 2
    assert torch.count_nonzero(module.body[0].K) == 0
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained == {"body.0.K", "body.0.L", "body.2.K", "body.2.L", "head.weight", "head.bias"}
    assert getattr(module, "calls", 1) == 1


def test_it_is_the_same_as_the_plain_loop():
    module, callback = Foreign(torch.optim.SGD), GeoLoRACallback(tau=0.05, adapter=ADAPTER)
    torch.manual_seed(1)
    trainer(callback).fit(module, loader())

    plain = Foreign()
    torch.manual_seed(1)
    inject_adapters(plain, ADAPTER)
    integrator = RankAdaptiveIntegrator(plain, tau=0.05)
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-2)
    for batch in loader():
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain.head(plain.body(batch[0])), batch[1]).backward()
        optimizer.step()
        integrator.step(optimizer)
    integrator.retract(optimizer)
    for a, b in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_accumulation_counts_optimizer_steps():
    callback = GeoLoRACallback(adapter=ADAPTER, adapt_every=2)
    trainer(callback, accumulate_grad_batches=2, max_epochs=2).fit(Foreign(), loader(batches=8))
    assert (callback.integrator.total_steps, callback.integrator.adaptations) == (8, 6)  # after 1, 2, 4, 6, 8; the end


class Manual(Foreign):
    """Manual optimization with a second optimizer that holds no adapter."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Linear(10, 1)

    def training_step(self, batch, batch_idx):
        ours, other = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        ours.zero_grad()
        self.manual_backward(loss)
        if batch_idx % 2:
            ours.step()
        other.zero_grad()
        self.manual_backward(self.critic(batch[0]).square().mean())
        other.step()

    def configure_optimizers(self):
        self.critic.requires_grad_(True)
        adapted = [p for n, p in self.named_parameters() if not n.startswith("critic")]
        return torch.optim.AdamW(adapted, lr=1e-2), torch.optim.SGD(self.critic.parameters(), lr=1e-2)


def test_manual_optimization_with_another_optimizer():
    callback = GeoLoRACallback(adapter=ADAPTER)
    trainer(callback).fit(Manual(), loader())
    assert callback.integrator.total_steps == 3
    assert callback.integrator.adaptations == 3 + 1


class Split(Foreign):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        raise AssertionError("refused before the first step")

    def configure_optimizers(self):
        return torch.optim.SGD(self.body[0].parameters(), lr=0.1), torch.optim.SGD(self.body[2].parameters(), lr=0.1)


def test_adapters_spread_over_two_optimizers_are_refused():
    with pytest.raises(ValueError, match="2 of the 2 optimizers hold adapters, and exactly one must"):
        trainer(GeoLoRACallback(adapter=ADAPTER)).fit(Split(), loader())


def test_an_optimizer_made_before_the_adapters_is_refused():
    class Early(Foreign):
        def __init__(self):
            super().__init__()
            self.early = torch.optim.SGD(self.parameters(), lr=0.1)

        def configure_optimizers(self):
            return self.early

    with pytest.raises(ValueError, match="0 of the 1 optimizers hold adapters"):
        trainer(GeoLoRACallback(adapter=ADAPTER)).fit(Early(), loader())


@pytest.mark.parametrize("other", [StochasticWeightAveraging(0.1), EMAWeightAveraging()])
def test_weight_averaging_is_refused_with_the_reason(other):
    with pytest.raises(ValueError, match=f"{type(other).__name__} averages .* take GeoLoRAEMAWeightAveraging"):
        trainer(GeoLoRACallback(adapter=ADAPTER), other).fit(Foreign(), loader())


def test_ranks_are_logged_as_often_as_the_trainer_logs(tmp_path):
    callback = GeoLoRACallback(adapter=ADAPTER, adapt_every=6)
    logger = CSVLogger(tmp_path, name="", version="")
    runs = trainer(callback, logger=logger, log_every_n_steps=2)
    runs.fit(Foreign(), loader())
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    names = header.split(",")
    expected = {f"geolora/{name}" for name in ("mean_rank", "adapter_params", "truncation_error", "skipped_steps")}
    expected |= {"rank/body.0", "rank/body.2"}
    expected |= {"geolora/energy_kept", "geolora/orthonormality_defect", "geolora/adaptation_time"}
    assert expected <= set(names)
    logged = [
        row for row in (dict(zip(names, row.split(","), strict=True)) for row in rows) if row["geolora/mean_rank"]
    ]
    assert [row["step"] for row in logged] == ["0", "0", "1", "3", "5"]  # the start, and batches as Lightning counts
    assert float(logged[-1]["rank/body.0"]) == find_adapters(runs.lightning_module)["body.0"].rank
    assert runs.callback_metrics["geolora/adapter_params"] == callback.integrator.adapter_parameters()


def test_ranks_are_logged_at_every_adaptation_of_a_short_run(tmp_path):
    """With Lightning's default of 50 steps between logs a run of 24 steps had two points."""
    logger = CSVLogger(tmp_path, name="", version="")
    callback = GeoLoRACallback(adapter=ADAPTER, adapt_every=5)
    trainer(callback, logger=logger, log_every_n_steps=24).fit(Foreign(), loader(batches=24))
    logged = [row["step"] for row in rows_of(tmp_path) if row["geolora/mean_rank"]]
    assert logged == ["0", "0", "1", "3", "7", "12", "17", "22", "23"]


def test_in_a_long_run_adaptations_are_logged_at_growing_distances():
    inject_adapters(model := Foreign(), ADAPTER)
    monitor = RankMonitor(RankAdaptiveIntegrator(model, tau=0.1))
    logged = []
    for step in range(20_000):
        monitor.integrator.adaptations += 1
        if monitor.is_due(step):
            logged.append(step)
            monitor.numbers(step)
    assert logged[:200] == list(range(200))
    assert len(logged) < 1300
    assert logged[-1] - logged[-2] == 99


def rows_of(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_with_accumulation_ranks_are_logged_once_a_step(tmp_path):
    settings = {"accumulate_grad_batches": 4, "log_every_n_steps": 2, "logger": CSVLogger(tmp_path, "", "")}
    trainer(GeoLoRACallback(adapter=ADAPTER, adapt_every=6), **settings).fit(Foreign(), loader(batches=26))
    rows = rows_of(tmp_path)
    logged = [row["step"] for row in rows if row["geolora/mean_rank"]]
    assert logged == ["0", "0", "1", "3", "5", "6"]  # 6: the rest of the epoch
    assert [row["step"] for row in rows if row["train_loss"]] == ["1", "3", "5"]


def test_rows_of_ranks_have_the_epoch_and_are_in_the_file_at_once(tmp_path):
    lengths = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            lengths.append(len(rows_of(tmp_path)))

    class Quiet(Foreign):
        def log(self, *args, **kwargs):
            pass

    callback = GeoLoRACallback(adapter=ADAPTER, adapt_every=4)
    settings = {"max_epochs": 2, "log_every_n_steps": 3, "logger": CSVLogger(tmp_path, "", "")}
    runs = trainer(callback, Watch(), **settings)
    runs.fit(Quiet(), loader(batches=5))
    assert [(r["step"], r["epoch"]) for r in rows_of(tmp_path) if r["geolora/mean_rank"]] == [
        ("0", "0"),
        ("0", "0"),
        ("1", "0"),
        ("2", "0"),
        ("3", "0"),
        ("4", "0"),
        ("5", "1"),
        ("7", "1"),
        ("8", "1"),
        ("9", "1"),  # the end of the epoch, with what the retraction after its last step found
    ]
    assert lengths == [2, 3, 4, 5, 6, 7, 7, 8, 9, 10]
    assert {"geolora/mean_rank", "rank/body.0", "geolora/energy_kept"} <= set(runs.logged_metrics)


def test_adapt_until_holds_the_ranks_for_the_rest_of_the_run():
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            seen.append([layer.rank for layer in find_adapters(module).values()])

    callback = GeoLoRACallback(tau=0.1, adapter=ADAPTER, adapt_until=0.5)
    trainer(callback, Watch(), max_epochs=2).fit(Foreign(), loader())
    assert len(seen) == 12
    assert any(ranks != seen[5] for ranks in seen[:5])
    assert all(ranks == seen[5] for ranks in seen[5:])
    assert callback.integrator.adaptations == 12


@pytest.mark.parametrize("fit", [{"max_epochs": 2}, {"max_steps": 12, "max_epochs": -1}])
def test_the_end_of_training_is_retracted(fit):
    module, callback = Foreign(), GeoLoRACallback(adapter=ADAPTER, adapt_every=5)
    trainer(callback, **fit).fit(module, loader())
    assert callback.integrator.total_steps == 12
    assert callback.integrator.adaptations == 5  # after 1, 2, 4 and 9 steps, and of the three that were left
    assert all(torch.count_nonzero(f) == 0 for a in find_adapters(module).values() for f in (a.K, a.L))


def test_validation_between_two_adaptations_does_not_disturb_the_cadence():
    modules = []
    for interval in (1.0, 1 / 6):
        torch.manual_seed(0)
        module, callback = Foreign(), GeoLoRACallback(adapter=ADAPTER, adapt_every=4)
        trainer(callback, max_epochs=2, val_check_interval=interval).fit(module, loader(), loader())
        modules.append(module)
    for a, b in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("make", "on_device"), [(torch.optim.AdamW, False), (RiemannianAdam, True)])
def test_training_without_one_adaptation_is_an_error(monkeypatch, make, on_device):
    monkeypatch.setattr("geolora_pl.training.steps._waits", lambda device: on_device)

    class Broken(Foreign):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * float("nan")

    with (
        pytest.warns(GeoLoRAWarning, match="skipped whole"),
        pytest.raises(RuntimeError, match=r"without one adaptation.*6 were skipped"),
    ):
        trainer(GeoLoRACallback(adapter=ADAPTER)).fit(Broken(make), loader())


def test_a_run_that_ends_before_its_cadence_is_retracted():
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = True

    module, callback = Foreign(), GeoLoRACallback(tau=0.01, adapter=ADAPTER)
    trainer(callback, Stop(), max_epochs=100, min_epochs=0, min_steps=0).fit(module, loader())
    assert callback.integrator.adapt_every == 10
    assert (callback.integrator.total_steps, callback.integrator.adaptations) == (1, 2)
    assert torch.count_nonzero(module.body[0].K) == 0


def test_a_broken_batch_changes_nothing_and_the_run_goes_on():
    class Once(Foreign):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx == 3 else loss

    states = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            states.append([p.detach().clone() for p in module.parameters()])

    callback = GeoLoRACallback(adapter=ADAPTER)
    with pytest.warns(GeoLoRAWarning, match="is not finite"):
        trainer(callback, Watch()).fit(Once(), loader())
    assert all(torch.equal(a, b) for a, b in zip(states[2], states[3], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(states[3], states[4], strict=True))
    assert (callback.integrator.skipped_steps, callback.integrator.total_steps) == (1, 5)


def test_a_run_shorter_than_the_cadence_is_refused_before_it_starts():
    with pytest.raises(ValueError, match="adapt_every=7 is longer than the run of 6 optimizer steps"):
        trainer(GeoLoRACallback(adapter=ADAPTER, adapt_every=7)).fit(Foreign(), loader())
    trainer(GeoLoRACallback(adapter=ADAPTER, adapt_every=7), fast_dev_run=True).fit(Foreign(), loader())


def test_the_cadence_may_exceed_the_batches_where_steps_are_manual():
    callback = GeoLoRACallback(adapter=ADAPTER, adapt_every=9)
    trainer(callback).fit(Several(), loader())
    assert callback.integrator.total_steps == 18
    assert callback.integrator.adaptations == 6  # after 1, 2, 4, 8 and 16 steps, and at the end


def test_adapt_until_of_an_endless_run_is_refused():
    with pytest.raises(ValueError, match=r"adapt_until=0.5 is a part of a run without an end"):
        trainer(GeoLoRACallback(adapter=ADAPTER, adapt_until=0.5), max_epochs=-1).fit(Foreign(), loader())


def test_two_places_that_say_what_to_adapt_are_refused():
    module = Foreign()
    inject_adapters(module, ADAPTER)
    with pytest.raises(ValueError, match="say what to adapt in one of the two places"):
        trainer(GeoLoRACallback(adapter=ADAPTER)).fit(module, loader())
    trainer(GeoLoRACallback()).fit(module, loader())


@pytest.mark.parametrize("adapt_every", [1, 5])  # with 5, two steps are pending in the checkpoint
def test_resuming_equals_one_run(tmp_path, adapt_every):
    def run(max_steps, ckpt_path=None, **more):
        torch.manual_seed(0)
        module, callback = Foreign(), GeoLoRACallback(adapter=ADAPTER, adapt_every=adapt_every)
        checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=12, save_top_k=-1)
        runs = trainer(callback, checkpoint, max_epochs=-1, max_steps=max_steps)
        runs.fit(module, loader(), ckpt_path=ckpt_path, **more)
        return module, callback

    whole, first = run(24)
    resumed, second = run(24, tmp_path / "step=12.ckpt", weights_only=True)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert first.integrator.state_dict() == second.integrator.state_dict()
    assert first.integrator.ranks() == second.integrator.ranks()


@pytest.mark.parametrize("adapt_every", [2, 4])  # with 2 nothing is pending at the end but what probes have gathered
def test_resuming_a_run_that_had_ended_leaves_a_retracted_state(tmp_path, adapt_every):
    def run():
        module, callback = Foreign(), GeoLoRACallback(adapter=ADAPTER, adapt_every=adapt_every)
        runs = trainer(callback, ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True))
        runs.fit(module, loader(), ckpt_path="last" if (tmp_path / "last.ckpt").exists() else None)
        return module

    first, second = run(), run()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.count_nonzero(second.body[0].K) == 0


def test_another_optimizer_than_the_checkpoints_is_refused(tmp_path):
    def run(optimizer, ckpt_path=None):
        runs = trainer(GeoLoRACallback(adapter=ADAPTER), ModelCheckpoint(tmp_path, save_last=True), max_epochs=2)
        runs.fit(Foreign(optimizer), loader(), ckpt_path=ckpt_path)

    run(torch.optim.AdamW)
    with pytest.raises(ValueError, match="made with the optimizer AdamW and this run has SGD"):
        run(torch.optim.SGD, tmp_path / "last.ckpt")


def test_the_usual_cadence_is_ten_and_less_in_a_short_run():
    # At a cadence of 1 always; of 4 after 1, 2, 4, 8, ... 40; of 10 after 1, 2, 4, 8, 16, 26, ... 196; and at the end.
    for batches, adaptations in ((4, 5), (40, 13), (200, 24)):
        callback = GeoLoRACallback(adapter=ADAPTER)
        trainer(callback).fit(Foreign(), loader(batch_size=1, batches=batches))
        assert callback.integrator.total_steps == batches
        assert callback.integrator.adaptations == adaptations


def test_directions_that_nothing_has_judged_are_not_left_where_ranks_may_change_for_a_short_time_only():
    callback = GeoLoRACallback(tau=0.9, adapt_every=10, adapt_until=0.1, adapter=ADAPTER)
    trainer(callback).fit(Foreign(), loader(batches=40))
    assert set(callback.integrator.ranks().values()) == {1}


@pytest.mark.parametrize("batches", [8, 9])  # with and without a step that is pending
@pytest.mark.parametrize("tau", [0.01, 0.9])
def test_directions_that_nothing_has_judged_are_not_left_where_a_run_stops_early(batches, tau):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == batches

    module, callback = Foreign(), GeoLoRACallback(tau=tau, adapt_every=10, adapter=ADAPTER)
    trainer(callback, Stop()).fit(module, loader(batches=40))
    assert callback.integrator.total_steps == batches
    for layer in find_adapters(module).values():
        assert torch.count_nonzero(layer.S.diagonal()) == layer.rank
        assert all(torch.count_nonzero(factor) == 0 for factor in (layer.K, layer.L))
        assert all(torch.count_nonzero(basis[:, : layer.probes]) == 0 for basis in (layer.U, layer.V))
    if tau == 0.9:
        assert set(callback.integrator.ranks().values()) == {1}


def test_the_first_retractions_come_after_1_2_4_and_so_on_until_the_cadence():
    class Adaptations(L.Callback):
        def on_train_batch_end(self, *_):
            after.append(callback.integrator.adaptations)

    after, callback = [], GeoLoRACallback(adapt_every=5, adapter=ADAPTER)
    trainer(callback, Adaptations(), max_epochs=-1, max_steps=16).fit(Foreign(), loader(batches=20))
    steps = [step for step, (before, now) in enumerate(zip([0, *after], after, strict=False), start=1) if now > before]
    assert steps == [1, 2, 4, 8, 13, 16]


@pytest.mark.parametrize(("given", "expected"), [(None, 3), (5, 5)])
def test_a_run_that_is_resumed_keeps_its_cadence_unless_told(tmp_path, given, expected):
    first = trainer(GeoLoRACallback(adapter=ADAPTER), max_epochs=5)
    first.fit(Foreign(), loader())
    first.save_checkpoint(tmp_path / "last.ckpt")
    callback = GeoLoRACallback(adapter=ADAPTER, adapt_every=given)
    trainer(callback, max_epochs=30).fit(Foreign(), loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert callback.integrator.adapt_every == expected


def test_ranks_change_in_a_run_of_unknown_length():
    callback = GeoLoRACallback(tau=0.01, adapter=ADAPTER, adapt_every=1)
    trainer(callback, max_epochs=2).fit(Foreign(), DataLoader(Endless(), batch_size=8))
    assert callback.integrator.total_steps == 12
    assert callback.integrator.rank_changes
    assert max(callback.integrator.ranks().values()) > 2


def test_a_second_run_with_another_trainer_starts_anew():
    module, callback = Foreign(), GeoLoRACallback(adapter=ADAPTER, adapt_until=0.5)
    for _ in range(2):
        changes = []

        class Watch(L.Callback):
            def on_train_batch_end(self, trainer, module, *args, changes=changes):
                changes.append(callback.integrator.rank_changes)

        trainer(callback, Watch()).fit(module, loader())
        assert changes == [True] * 3 + [False] * 3


@pytest.mark.parametrize(("adapt_until", "changing"), [(1.0, 18), (0.5, 9)])
def test_several_manual_steps_a_batch_do_not_shorten_the_adapting_part(adapt_until, changing):
    seen = []

    callback = GeoLoRACallback(adapter=ADAPTER, adapt_until=adapt_until)
    trainer(callback).fit(Several(lambda: seen.append(callback.integrator.rank_changes)), loader())
    assert seen == [True] * changing + [False] * (18 - changing)


def test_a_finished_run_does_not_watch_the_next():
    module = Foreign()
    inject_adapters(module, ADAPTER)
    first, second = GeoLoRACallback(), GeoLoRACallback()
    trainer(first).fit(module, loader())
    trainer(second).fit(module, loader())
    assert (first.integrator.total_steps, first.integrator._watch.new_steps) == (6, 0)
    assert second.integrator.total_steps == 6


def test_a_foreign_module_is_tested_from_its_checkpoint_at_its_ranks(tmp_path):
    module, callback = Foreign(), GeoLoRACallback(adapter=ADAPTER)
    runs = trainer(callback, ModelCheckpoint(tmp_path, save_last=True))
    runs.fit(module, loader(), loader())
    expected = trainer(GeoLoRACallback()).test(module, loader(), verbose=False)[0]["val_loss"]
    fresh = Foreign()
    loaded = trainer(GeoLoRACallback(adapter=ADAPTER)).test(
        fresh, loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True, verbose=False
    )
    assert loaded[0]["val_loss"] == pytest.approx(expected, rel=rounding(torch.float32))
    assert fresh.body[0].rank == module.body[0].rank


def test_fit_twice_with_one_trainer_and_callback():
    module, callback = Foreign(), GeoLoRACallback(adapter=ADAPTER)
    runs = trainer(callback)
    runs.fit(module, loader())
    runs.fit_loop.max_epochs = 2
    runs.fit(module, loader())
    assert callback.integrator.total_steps == 12
    assert callback.integrator.adaptations == 12 + 2  # and at the end of each fit


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision):
    module, callback = Foreign(), GeoLoRACallback(adapter=ADAPTER, adapt_every=1)
    trainer(callback, precision=precision, max_epochs=5).fit(module, loader())
    adapter = module.body[0]
    assert adapter.U.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    assert callback.integrator.total_steps == 30
    assert is_orthonormal(adapter.U)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"tau": 1.5}, "tau=1.5"), ({"adapt_until": 0.0}, "adapt_until=0.0"), ({"adapt_until": 1.1}, "adapt_until=1.1")],
)
def test_bad_settings_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        GeoLoRACallback(**settings)


@pytest.mark.parametrize("overflow", [3, None])
def test_steps_that_a_gradient_scaler_skips_are_not_counted_and_change_nothing(overflow):
    """Lightning's 16-mixed with its scaler, on a CPU, with a planted overflow."""

    class Overflows(Foreign):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx == overflow else loss

    states = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            moments = [v for s in trainer.optimizers[0].state.values() for v in s.values()]
            states.append([t.detach().clone() for t in (*module.parameters(), *moments)])

    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
    callback = GeoLoRACallback(adapter=ADAPTER)
    trainer(callback, Watch(), plugins=[plugin]).fit(Overflows(), loader())
    if overflow is None:
        assert callback.integrator.total_steps == 6
    else:
        assert all(torch.equal(a, b) for a, b in zip(states[2], states[3], strict=True))
        assert (callback.integrator.total_steps, callback.integrator.adaptations) == (5, 5 + 1)


def test_experts_that_stay_frozen_are_named_in_the_notes(tmp_path):
    """A mixture in the style of transformers 5: its experts get no adapters, and nobody was told."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 8, 8) / 8)

        def forward(self, x):
            return x + torch.einsum("bi,eij->bj", x, self.up) / 3

    class Mixture(Small):
        def build_model(self):
            return nn.Sequential(nn.Linear(10, 8), Experts(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))

    logger = CSVLogger(tmp_path, name="", version="")
    trainer(GeoLoRACallback(), max_steps=2, logger=logger, log_every_n_steps=1).fit(Mixture(), loader())
    said = (tmp_path / "notes.txt").read_text()
    assert said == "model.1.up: experts in a stacked weight have no adapters and stay frozen (192 parameters)\n"
