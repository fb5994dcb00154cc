import csv
import io
import sys
import time
from contextlib import nullcontext

import pytest
import torch
from foreign import ADAPTER, Foreign, loader, trainer
from kept import Keeps
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tolerance import is_orthonormal, rounding
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from geolora_pl import AdapterConfig, GeoLoRACallback, RankAdaptiveIntegrator, inject_adapters
from geolora_pl.adapters.inject import find_adapters
from geolora_pl.lightning.monitor import RankMonitor, largest_defect
from geolora_pl.math.decomposition import orthonormality_defect
from geolora_pl.training.clock import DeviceClock

NUMBERS = {
    "geolora/mean_rank",
    "rank/body.0",
    "rank/body.2",
    "geolora/adapter_params",
    "geolora/truncation_error",
    "geolora/energy_kept",
    "geolora/orthonormality_defect",
    "geolora/adaptation_time",
    "geolora/skipped_steps",
    "geolora/rollbacks",
    "geolora/gradient_norm",
    "geolora/lr_pg1",
}
PICTURES = ("geolora/rank_map", "geolora/ranks_over_time", "geolora/spectra")


def make(layers=2, max_rank=6):
    torch.manual_seed(0)
    model = nn.ModuleDict({"b": nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(12, 10)}) for _ in range(layers))})
    inject_adapters(model, AdapterConfig(init_rank=3, max_rank=max_rank))
    return RankMonitor(RankAdaptiveIntegrator(model, tau=0.1))


def move(monitor):
    """A retraction with something to retract."""
    for layer in monitor.integrator.adapters.values():
        layer.K.data.normal_()
        layer.L.data.normal_()
    monitor.integrator.retract()


def test_tensorboard_shows_numbers_and_pictures_without_any_setting(tmp_path):
    callback = GeoLoRACallback(tau=0.05, adapter=ADAPTER)
    runs = trainer(callback, logger=TensorBoardLogger(tmp_path, name="", version=""), log_every_n_steps=2, max_epochs=3)
    runs.fit(Foreign(), loader())
    log = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "images": 0})
    log.Reload()
    assert set(log.Tags()["scalars"]) >= NUMBERS
    last = {name: log.Scalars(name)[-1] for name in NUMBERS}
    assert last["rank/body.0"].value == find_adapters(runs.lightning_module)["body.0"].rank
    kept = 1 - last["geolora/truncation_error"].value ** 2
    assert last["geolora/energy_kept"].value == pytest.approx(kept, abs=rounding(torch.float32, 1))
    assert 0 < last["geolora/orthonormality_defect"].value < rounding(torch.float32, 12 * 5)
    assert 0 < last["geolora/adaptation_time"].value < 1
    assert [e.step for e in log.Scalars("geolora/mean_rank")] == [
        0,
        *range(18),
    ]  # a run this short adapts at every step
    assert log.Scalars("geolora/mean_rank")[0].value == 2
    assert len(log.Scalars("geolora/energy_kept")) == 18  # nothing was truncated at the start
    assert last["geolora/lr_pg1"].value == pytest.approx(1e-2)
    assert 0 < last["geolora/gradient_norm"].value < 10
    for name in PICTURES:
        shown = log.Images(name)
        assert shown[-1].step == 17
        picture = Image.open(io.BytesIO(shown[-1].encoded_image_string))
        assert picture.size == (shown[-1].width, shown[-1].height)
        assert len(picture.getcolors(100_000)) > 3


def test_any_logger_gets_the_numbers_and_is_asked_for_nothing_else(tmp_path):
    keeps, table = Keeps(), CSVLogger(tmp_path, name="", version="")
    runs = trainer(GeoLoRACallback(adapter=ADAPTER), logger=[keeps, table], log_every_n_steps=6)
    runs.fit(Foreign(), loader())
    assert set(keeps.seen) >= NUMBERS
    assert set((tmp_path / "metrics.csv").read_text().split("\n")[0].split(",")) >= NUMBERS


def test_weights_and_biases_gets_pictures(monkeypatch):
    class Wandb(WandbLogger):
        def __init__(self):
            self.shown = []

        def log_image(self, key, images, step=None, **kwargs):
            self.shown.append((key, images[0].mode, step))

    logger = Wandb()
    make().show([logger, Keeps()], 7)
    assert logger.shown == [(name, "RGB", 7) for name in PICTURES]


def test_without_a_logger_the_numbers_are_there_for_callbacks(tmp_path):
    runs = trainer(
        GeoLoRACallback(adapter=ADAPTER), ModelCheckpoint(tmp_path, monitor="geolora/energy_kept", mode="max")
    )
    runs.fit(Foreign(), loader())
    assert set(runs.callback_metrics) >= NUMBERS
    assert set(runs.progress_bar_metrics) >= {"rank", "params"}
    assert runs.checkpoint_callback.best_model_score == runs.callback_metrics["geolora/energy_kept"]


def test_the_mean_rank_is_no_rank_of_an_adapter_that_is_named_mean():
    model = nn.ModuleDict({"mean": nn.Linear(12, 10), "other": nn.Linear(12, 10)})
    inject_adapters(model, AdapterConfig(init_rank=3, rank_pattern={"mean": 1}, target_modules=["mean", "other"]))
    assert RankMonitor(RankAdaptiveIntegrator(model, tau=0.1)).numbers(0)["geolora/mean_rank"] == 2


class Reads(TorchDispatchMode):
    """Counts the numbers that are read from tensors, each of which waits for the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_tensors_are_read_when_numbers_are_logged_and_once_a_retraction(monkeypatch):
    read = []
    monkeypatch.setattr("geolora_pl.lightning.monitor.largest_defect", lambda layers: read.append(1) or 0.0)
    trainer(GeoLoRACallback(adapter=ADAPTER, adapt_every=3), log_every_n_steps=6, max_epochs=2).fit(Foreign(), loader())
    assert len(read) == 7  # at the start, and at the retractions after 1, 2, 4, 7, 10 and 12 steps


def test_nothing_is_read_again_until_there_is_a_retraction():
    monitor = make()
    move(monitor)
    with Reads() as reads:
        monitor.numbers(0)
        assert (first := reads.count) > 0
        monitor.numbers(1)
        assert reads.count == first
        move(monitor)
        reads.count = 0
        monitor.numbers(2)
        assert reads.count == first


def test_the_defect_is_the_largest_of_all_bases():
    monitor = make()
    move(monitor)
    layers = monitor.integrator.adapters.values()
    bases = [basis.data for layer in layers for basis in (layer.U, layer.V)]
    assert all(is_orthonormal(basis) for basis in bases)
    assert largest_defect(layers) < rounding(torch.float32, 12 * 6)
    for more, basis in enumerate(bases, 1):  # each in its turn has the largest defect
        basis *= 1 + 0.1 * more
        assert largest_defect(layers) == pytest.approx(float(orthonormality_defect(basis)), rel=rounding(basis.dtype))


def test_pictures_come_less_and_less_often_and_stop_when_they_take_too_long(monkeypatch):
    class Wandb(WandbLogger):
        def __init__(self):
            self.steps = []

        def log_image(self, key, images, step=None, **kwargs):
            self.steps.append(step) if key == "geolora/rank_map" else None

    logger, monitor = Wandb(), make()
    monkeypatch.setattr("geolora_pl.lightning.monitor._SHARE", 1e9)
    for step in range(1000):
        monitor.show([logger], step)
    assert 20 < len(logger.steps) < 60
    monkeypatch.setattr("geolora_pl.lightning.monitor._SHARE", 1e-9)
    monitor.show([logger], 10_000)
    assert logger.steps[-1] < 1000
    monitor.show([logger], 10_001, at_last=True)
    assert logger.steps[-1] == 10_001


def test_the_ranks_over_time_stay_few_and_evenly_spread():
    monitor = make()
    for step in range(0, 50_000, 10):
        monitor.numbers(step)
    gaps = [b - a for a, b in zip(monitor.steps, monitor.steps[1:], strict=False)]
    assert monitor.steps[0] == 0
    assert 40 <= len(monitor.steps) <= 128
    assert max(gaps) <= 4 * min(gaps)
    assert all(picture.width < 1500 for picture in monitor.pictures().values())


def test_a_rank_of_zero_and_many_layers_are_drawn():
    monitor = make(layers=150, max_rank=8)
    monitor.numbers(0)
    before = monitor.pictures()
    for layer in monitor.integrator.adapters.values():
        for factor in (layer.U, layer.S, layer.V):
            factor.data.zero_()
        layer.read_rank()
    monitor.numbers(0)
    pictures = monitor.pictures()
    assert pictures["geolora/ranks_over_time"].height < 2700
    assert set(pictures) == set(PICTURES)
    for name, picture in pictures.items():  # below the title they tell ranks of zero from those before
        if name == "geolora/ranks_over_time":
            continue  # its colours tell ranks from each other, and these are all alike
        below = (0, 80, *picture.size)
        assert picture.size == before[name].size
        assert picture.crop(below).tobytes() != before[name].crop(below).tobytes()


def test_thousands_of_layers_are_thinned_out_and_the_pictures_stay_of_a_size():
    monitor = make(layers=1000, max_rank=3)
    monitor.numbers(0)
    pictures = monitor.pictures()
    assert all(picture.width < 9000 and picture.height < 2700 for picture in pictures.values())
    assert max(picture.height for picture in pictures.values()) > 2200
    assert pictures["geolora/rank_map"].width > 7000


def test_what_the_last_retraction_found_is_logged_as_well(tmp_path):
    callback = GeoLoRACallback(tau=0.01, adapter=ADAPTER, adapt_every=4)  # of 6 steps: the last retraction is of two
    runs = trainer(callback, logger=TensorBoardLogger(tmp_path, name="", version=""), log_every_n_steps=5)
    runs.fit(Foreign(), loader())
    assert callback.integrator.adaptations == 4  # the others came after 1, 2 and 4 steps
    log = EventAccumulator(str(tmp_path))
    log.Reload()
    ranks = callback.integrator.ranks()
    assert {name: log.Scalars(f"rank/{name}")[-1].value for name in ranks} == ranks
    assert log.Scalars("geolora/truncation_error")[-1].value == pytest.approx(
        callback.integrator.truncation_error, rel=rounding(torch.float32, 1)
    )
    assert callback.monitor.ranks[-1] == list(ranks.values())
    assert float(runs.callback_metrics["geolora/adapter_params"]) == callback.integrator.adapter_parameters()


def test_the_ranks_at_the_start_are_kept_where_the_first_batch_is_logged_too(tmp_path, capfd):
    callback = GeoLoRACallback(tau=0.01, adapter=ADAPTER)  # the first step moves the ranks, and both are step 0
    logger = CSVLogger(tmp_path, name="", version="")
    trainer(callback, logger=logger, log_every_n_steps=1, enable_model_summary=True).fit(Foreign(), loader())
    assert callback.monitor.before == {"body.0": 2, "body.2": 2}
    found = list(callback.integrator.ranks().values())
    assert f" 2.0 -> {sum(found) / 2:.1f} " in capfd.readouterr().out
    with (tmp_path / "metrics.csv").open() as file:
        first = [row for row in csv.DictReader(file) if row["step"] == "0" and row["geolora/mean_rank"]]
    assert float(first[0]["geolora/mean_rank"]) == 2 < float(first[1]["geolora/mean_rank"])
    assert [row["geolora/energy_kept"] == "" for row in first] == [
        True,
        False,
    ]  # nothing was truncated before the first


def test_a_resumed_run_knows_the_ranks_before_it(tmp_path):
    def fit(epochs, ckpt_path=None):
        torch.manual_seed(0)
        callback = GeoLoRACallback(tau=0.05, adapter=ADAPTER)
        checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        runs = trainer(callback, checkpoint, max_epochs=epochs, log_every_n_steps=2)
        runs.fit(Foreign(), loader(), ckpt_path=ckpt_path)
        return callback.monitor.state_dict()

    whole = fit(2)
    assert whole["steps"] == list(range(12))
    assert fit(2, tmp_path / "epoch=0.ckpt") == whole


def test_the_clock_counts_what_was_done():
    clock = DeviceClock(torch.device("cpu"))
    assert (clock.last(), clock.total()) == (None, 0.0)
    start = time.perf_counter()
    for _ in range(2):
        began = clock.now()
        time.sleep(0.01)
        clock.add(began)
    passed = time.perf_counter() - start
    assert 0.01 <= clock.last() < clock.total() <= passed


def test_on_a_gpu_the_clock_waits_only_when_it_is_read(monkeypatch):
    """With events that stand in for CUDA's: a device works 2 ms between two of them."""
    made = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.ms, self.recorded, self.waited = 2 * len(made), False, False
            made.append(self)

        def record(self):
            self.recorded = True

        def synchronize(self):
            self.waited = True

        def elapsed_time(self, end):
            assert self.recorded
            assert end.waited
            return end.ms - self.ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    clock = DeviceClock(torch.device("cuda"))
    for _ in range(3):
        clock.add(clock.now())
    assert not any(event.waited for event in made)
    assert clock.last() == pytest.approx(0.002)
    assert clock.total() == pytest.approx(0.006)


def test_pictures_need_no_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    runs = trainer(GeoLoRACallback(adapter=ADAPTER), logger=logger, log_every_n_steps=6)
    runs.fit(Foreign(), loader())
    log = EventAccumulator(str(tmp_path))
    log.Reload()
    assert "geolora/rank_map" in log.Tags()["images"]
