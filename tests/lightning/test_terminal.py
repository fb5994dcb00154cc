import io
import re

import pytest
import torch
from foreign import ADAPTER, Foreign, loader, trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from torch import nn

from geolora_pl import AdapterConfig, GeoLoRACallback, RankAdaptiveIntegrator, inject_adapters, merge_adapters
from geolora_pl.adapters.inject import find_adapters, has_adapters
from geolora_pl.lightning.monitor import RankMonitor
from geolora_pl.lightning.progress import fit_bar
from geolora_pl.lightning.summary import rank_table, start_summary
from geolora_pl.report.printed import print_summary


def blocks(depth=3):
    torch.manual_seed(0)
    layers = [nn.ModuleDict({"fc1": nn.Linear(8, 16), "fc2": nn.Linear(16, 8)}) for _ in range(depth)]
    model = nn.ModuleDict({"m": nn.ModuleList(layers), "head": nn.Linear(8, 2)})
    inject_adapters(model, AdapterConfig(init_rank=2, max_rank=4, modules_to_save=["head"]))
    return model


def watched(model):
    return RankMonitor(RankAdaptiveIntegrator(model, tau=0.1))


def printed(table, lines, width=80):
    print_summary(table, lines, Console(width=width, file=(file := io.StringIO())))
    return file.getvalue()


def fit(tmp_path, *more, enable_model_summary=True, **settings):
    module, callback = Foreign(), GeoLoRACallback(tau=0.01, adapter=ADAPTER)
    logger = CSVLogger(tmp_path, name="", version="")
    defaults = {"logger": logger, "max_epochs": 2, "log_every_n_steps": 6}
    settings = {**defaults, "enable_model_summary": enable_model_summary, **settings}
    trainer(callback, *more, **settings).fit(module, loader(), loader())
    return module


def test_the_start_says_what_is_adapted_what_is_trained_and_what_it_takes():
    out = printed(*start_summary(model := blocks(), watched(model)))
    assert ["fc1", "3", "16 x 8", "2", "4", "144"] in [
        [cell.strip() for cell in row.strip("│").split("│")] for row in out.splitlines()
    ]
    # 6 layers of 24 at rank 2 with 2 probes; head 18; base 3 * (144 + 136) + 18
    parts = "288 in adapters (34.3% of the base of 840, as a LoRA of rank 2.0) and 18 in full (head and others)"
    assert f"trained: 306 parameters: {parts}" in out
    # K and L of 6 layers have columns for rank 4 and 2 probes; Lightning's summary counts all of them.
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 882
    how = "576 of adapters at their largest, 288 of probes (in no exported file), and 18 in full"
    assert f"allocated: 882 parameters, trainable in Lightning's summary: {how}" in out
    assert "memory: 3.43 kB of weights, 7.3 kB of adapters, 3.53 kB of gradients, besides" in out


def test_layers_of_several_shapes_and_ranks_are_told_together():
    model = nn.ModuleDict({"m": nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(n, 8)}) for n in (2, 8))})
    inject_adapters(model, AdapterConfig(init_rank=3, max_rank=4))
    rows = [
        [c.strip() for c in r.strip("│").split("│")]
        for r in printed(*start_summary(model, watched(model))).splitlines()
    ]
    assert ["fc", "2", "2 shapes", "2 to 3", "2 to 4", "68"] in rows


def test_the_table_of_ranks_has_depth_in_order_and_how_the_mean_moved():
    monitor = watched(blocks())
    for rank, layer in enumerate(monitor.integrator.adapters.values(), start=1):
        layer.rank = min(rank, 4)
    table = rank_table(monitor)
    cells = [[str(cell) for cell in column.cells] for column in table.columns]
    assert cells[:3] == [["fc1", "fc2"], ["1 3 4", "2 4 4"], ["2.0 -> 2.7", "2.0 -> 3.3"]]
    assert [column.footer for column in table.columns] == ["all", "", "2.0 -> 3.0", "432"]


def test_a_fit_ends_with_ranks_scores_time_and_the_files(tmp_path, capfd):
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", monitor="val_loss", save_last=True)
    module = fit(tmp_path, checkpoint)
    out = capfd.readouterr().out
    assert "allocated: " in out
    end = out.partition("ranks found, by depth")[2]
    assert "at max_rank: 2 of 2 adapters" in end
    assert f"│ 0              │ {module.body[0].rank}     │ 2.0 -> {module.body[0].rank}.0 │" in end
    base = sum(p.numel() for p in Foreign().body.parameters())
    assert f"of the base of {base}, as a LoRA of rank " in end
    assert "and 18 in full (head and others)" in end
    for line in ("val_loss: 0.", "train_loss: 0.", "time: ", "for 13 adaptations of the ranks"):
        assert line in end, line
    assert f"logs: {tmp_path}" in end
    assert f"best checkpoint: {checkpoint.best_model_path} (val_loss 0." in end
    assert f"last checkpoint: {checkpoint.last_model_path}" in end
    assert "rank/body.0" not in end


def test_a_resumed_run_counts_the_adaptations_that_its_time_is_of(tmp_path, capfd):
    def fit(epochs, ckpt_path=None):
        callback = GeoLoRACallback(adapter=ADAPTER, adapt_every=4)
        checkpoint = ModelCheckpoint(tmp_path, save_last=True)
        settings = {"max_epochs": epochs, "enable_model_summary": True}
        trainer(callback, checkpoint, **settings).fit(Foreign(), loader(batches=8), ckpt_path=ckpt_path)
        return callback.integrator.adaptations, capfd.readouterr().out

    assert fit(3)[0] == 9  # after 1, 2, 4, 8, 12, ... 24 steps, and at the end
    adaptations, out = fit(4, tmp_path / "last.ckpt")
    assert adaptations == 12
    assert "for 3 adaptations of the ranks" in out


def test_the_last_retraction_is_timed_as_well(capfd):
    callback = GeoLoRACallback(adapter=ADAPTER, adapt_every=4)
    trainer(callback, enable_model_summary=True).fit(Foreign(), loader())
    assert callback.integrator.adaptations == 4  # after 1, 2 and 4 steps, and of the two that were left
    assert "for 4 adaptations of the ranks" in capfd.readouterr().out


def test_it_is_quiet_when_told(tmp_path, capfd):
    fit(tmp_path, enable_model_summary=False)
    assert capfd.readouterr().out == ""


def test_long_names_are_whole_in_a_file_and_folded_on_a_narrow_terminal():
    name = "a_rather_long_name_of_a_module.in_another_of_a_long_name.query_key_value"
    model = nn.Linear(8, 8)
    for part in reversed(name.split(".")):
        model = nn.ModuleDict({part: model})
    model["other"] = nn.Linear(8, 8)  # names have no beginning in common
    inject_adapters(model, AdapterConfig(init_rank=2))
    for terminal in (False, True):
        console = Console(width=60, file=io.StringIO(), force_terminal=terminal, color_system=None)
        print_summary(rank_table(watched(model)), [], console)
        assert console.width == 60  # it may be the program's own
        out = console.file.getvalue()
        assert (name in out) != terminal
        assert max(map(len, out.splitlines())) <= 60 or not terminal


@pytest.mark.parametrize("width", [40, 200])
def test_it_reads_without_colour_and_no_line_is_cut(width, monkeypatch, capfd):
    monkeypatch.setenv("NO_COLOR", "1")
    table, lines = start_summary(model := blocks(), watched(model))
    out = printed(table, lines, width)
    assert "\x1b" not in out
    assert all(line in out for line in lines)


@pytest.mark.parametrize("width", [30, 40, 50, 60])
def test_a_narrow_terminal_cuts_no_number(width):
    """In a window of 60 columns 1,032,192 parameters were 1,032,…: a cell goes on in its next line."""
    model = nn.ModuleDict({"a_long_name": nn.ModuleList(nn.Linear(512, 1024) for _ in range(12))})
    inject_adapters(model, AdapterConfig(init_rank=100, max_rank=128))
    for table in (start_summary(model, watched(model))[0], rank_table(watched(model))):
        console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
        print_summary(table, [], console)
        rows = [line.strip("│").split("│") for line in console.file.getvalue().splitlines() if line.startswith("│")]
        cells = ["".join(row[i].strip() for row in rows) for i in range(len(table.columns))]
        assert "…" not in "".join(cells)
        assert any("1,843,200" in cell for cell in cells)  # 12 * 100 * (512 + 1024)


@pytest.mark.usefixtures("one_thread")
def test_only_the_first_of_two_processes_prints(capfd):
    module = Foreign()
    inject_adapters(module, ADAPTER)
    settings = {"devices": 2, "strategy": "ddp_fork", "enable_model_summary": True}
    trainer(GeoLoRACallback(), **settings).fit(module, loader())
    out = capfd.readouterr().out
    assert (out.count("allocated: "), out.count("ranks found")) == (1, 1)


def test_the_progress_bar_shows_mean_rank_and_whole_parameters(tmp_path):
    class Bar(RichProgressBar):
        seen = None

        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            Bar.seen = self.get_metrics(trainer, pl_module)

    module = fit(tmp_path, Bar(), enable_progress_bar=True, log_every_n_steps=1, enable_model_summary=False)
    ranks = [layer.rank for layer in find_adapters(module).values()]
    assert Bar.seen["rank"] == f"{sum(ranks) / 2:.1f}"
    assert Bar.seen["params"] == str(ranks[0] * 22 + ranks[1] * 20)
    fit_bar(None)  # no bar


@pytest.mark.parametrize(("width", "has_bar"), [(80, False), (140, True)])
def test_on_a_narrow_terminal_the_drawing_of_the_bar_gives_way_to_the_numbers(width, has_bar, monkeypatch):
    """At 80 columns the numbers were folded into five lines beside a bar of 16 columns."""
    monkeypatch.setattr("geolora_pl.lightning.progress.get_console", lambda: Console(width=width))
    fit_bar(bar := RichProgressBar())
    kinds = [type(column).__name__ for column in bar.configure_columns(None)]
    assert ("CustomBarColumn" in kinds, "ProcessingSpeedColumn" in kinds) == (has_bar, has_bar)
    assert {"BatchesProcessedColumn", "CustomTimeColumn"} <= set(kinds)


def test_a_learning_rate_is_no_result(capfd, tmp_path):
    """A fit ended with ``lr-RiemannianAdam/pg2: 0.0000`` among its scores."""
    monitored = {"logger": CSVLogger(tmp_path), "enable_model_summary": True, "log_every_n_steps": 1}
    trainer(GeoLoRACallback(adapter=ADAPTER), LearningRateMonitor(), **monitored).fit(Foreign(), loader())
    end = capfd.readouterr().out.partition("ranks found, by depth")[2]
    assert "train_loss: " in end
    assert "lr-AdamW" not in end


def test_a_progress_bar_that_formats_its_metrics_is_left_to_it():
    class Bar(TQDMProgressBar):
        seen = None

        def get_metrics(self, trainer, pl_module):
            metrics = super().get_metrics(trainer, pl_module)
            Bar.seen = {name: f"{value:.2e}" if isinstance(value, float) else value for name, value in metrics.items()}
            return Bar.seen

    settings = {"enable_progress_bar": True, "log_every_n_steps": 1}
    trainer(GeoLoRACallback(adapter=ADAPTER), Bar(), **settings).fit(Foreign(), loader())
    assert re.fullmatch(r"\d\.\d\de\+0[12]", Bar.seen["params"])


def test_a_module_may_merge_its_adapters_when_training_ends(capfd):
    class Merges(Foreign):
        def on_train_end(self):
            merge_adapters(self)

    callback = GeoLoRACallback(adapter=ADAPTER)
    trainer(callback, enable_model_summary=True).fit(module := Merges(), loader())
    assert not has_adapters(module)
    active, base = callback.integrator.adapter_parameters(), sum(p.numel() for p in Foreign().body.parameters())
    assert f"{active} in adapters ({active / base:.1%} of the base of {base}, " in capfd.readouterr().out


class Bracketed(Foreign):
    """Names that rich would take for its markup."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"[/x]": nn.Linear(10, 12), "[bold]": nn.Linear(12, 8)})

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.body["[bold]"](self.body["[/x]"](x))), y)


def test_names_are_printed_as_they_are(capfd):
    adapter = AdapterConfig(init_rank=2, max_rank=4, modules_to_save=["head"])
    trainer(GeoLoRACallback(adapter=adapter), enable_model_summary=True).fit(Bracketed(), loader())
    start, _, end = capfd.readouterr().out.partition("ranks found, by depth")
    for table in (start, end):
        assert "layers of body" in table
        assert " [/x] " in table
        assert " [bold] " in table
