import contextlib
import csv
import re
from importlib.metadata import version
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from flags import FLAGS
from kept import Keeps
from lightning.pytorch.loggers import TensorBoardLogger
from metrics_file import OF_A_CLASSIFIER, logged_names
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import geolora_pl
from geolora_pl import GeoLoRAWarning, inject_adapters
from geolora_pl.cli.commands import ranks_tables
from geolora_pl.cli.dispatch import main
from geolora_pl.cli.train import GeoLoRACLI
from geolora_pl.data import TextFiles
from geolora_pl.loggers import CSVLogger
from geolora_pl.storage.checkpoint import describe_adapters

pytestmark = pytest.mark.usefixtures("one_parser")
ROOT = Path(__file__).parents[2]
LIMITS = {
    "max_epochs": 1,
    "limit_train_batches": 4,
    "limit_val_batches": 1,
    "limit_test_batches": 1,
    "log_every_n_steps": 4,
}
SMALL_BATCH = "--data.init_args.batch_size=16"
QUICK = [SMALL_BATCH, *(f"--trainer.{name}={value}" for name, value in LIMITS.items())]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder that sees the project's configs and keeps its runs to itself."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command, *more, quick=QUICK):
    main([command, "--config", "configs/quickstart.yaml", *quick, *FLAGS, *more])


def test_fit_then_test_then_predict(folder, capfd):
    run("fit", "--trainer.log_every_n_steps=2")
    out = capfd.readouterr().out
    assert re.search(r"test_accuracy: 0\.\d{4}", out)
    assert re.search(r"in adapters \(\d+\.\d% of the base of 204,416", out)
    assert "tensorboard --logdir lightning_logs/quickstart" in out
    assert "python -m geolora_pl report --run lightning_logs/quickstart" in out
    assert out.count("ranks found") == 1
    assert re.search(r"│ attn\.qkv\s*│ \d+ \d+ \d+ \d+ ", out)
    logs = folder / "lightning_logs" / "quickstart"
    assert list(logs.glob("events.out.tfevents.*"))
    assert (logs / "config.yaml").is_file()
    assert {*OF_A_CLASSIFIER, "rank/blocks.0.attn.qkv"} <= logged_names(logs / "metrics.csv")

    saved = (logs / "config.yaml").read_text()
    last = str(logs / "checkpoints" / "last.ckpt")
    main(["test", "--config", "lightning_logs/quickstart/config.yaml", "--ckpt_path", last, *FLAGS])
    assert "test_accuracy" in capfd.readouterr().out
    assert (logs / "config.yaml").read_text() == saved


def test_validate_and_predict(folder, capfd):
    run("fit", "--trainer.logger=false", "--test_after_fit=false", "--trainer.default_root_dir=run")
    (last,) = Path("run").rglob("last.ckpt")
    for command, expected in (("validate", "val_accuracy"), ("predict", "")):
        output = ["--output=p.csv"] if command == "predict" else []
        limits = ["--trainer.limit_val_batches=1", "--trainer.limit_predict_batches=1"]
        run(command, f"--ckpt_path={last}", *output, quick=limits)
        assert not expected or expected in capfd.readouterr().out


def test_with_the_models_summary_there_is_a_table_at_the_start_and_still_one_at_the_end(folder, capfd):
    run("fit", "--trainer.enable_model_summary=true", "--trainer.logger=false", "--test_after_fit=false")
    out = capfd.readouterr().out
    assert re.search(r"│ attn\.qkv\s*│ +4 │ 192 x 64 │ +2 │ +16 │ +2,048 │", out)
    assert (out.count("allocated: "), out.count("ranks found")) == (1, 1)
    assert "look closer" not in out


def test_resuming_from_last_in_the_fixed_folder_really_resumes(folder):
    run("fit")
    first = torch.load("lightning_logs/quickstart/checkpoints/last.ckpt", weights_only=True)
    run("fit", "--trainer.max_epochs=2", "--ckpt_path=last")
    second = torch.load("lightning_logs/quickstart/checkpoints/last.ckpt", weights_only=True)
    assert (first["global_step"], second["global_step"]) == (4, 8)
    state = next(v for k, v in second["callbacks"].items() if "GeoLoRA" in k)
    assert state["integrator"]["total_steps"] == 8
    kept = [path.name for path in Path("lightning_logs/quickstart").glob("metrics*.csv")]
    assert sorted(kept) == ["metrics.1.csv", "metrics.csv"]


def test_last_is_the_last_epoch_though_the_first_was_the_best_and_a_finished_run_trains_nothing(folder, capfd):
    lasting = ["--trainer.max_epochs=2", "--trainer.limit_test_batches=1", "--model.init_args.head_lr=1e-12"]
    lasting += ["--model.init_args.optimizer.init_args.lr=0"]  # no epoch is better than the first
    run("fit", *lasting)
    printed = re.search(r"test_accuracy: (0\.\d{4})", capfd.readouterr().out)[1]
    path = "lightning_logs/quickstart/checkpoints/last.ckpt"
    finished = torch.load(path, weights_only=True)
    assert (finished["epoch"], finished["global_step"]) == (1, 8)
    run("test", f"--ckpt_path={path}", quick=[SMALL_BATCH, "--trainer.limit_test_batches=1"])
    tested = re.search(r"test_accuracy +│ +([0-9.]+)", capfd.readouterr().out)[1]
    assert f"{float(tested):.4f}" == printed

    run("fit", *lasting, "--ckpt_path=last")
    again = torch.load(path, weights_only=True)
    assert again["global_step"] == 8
    for name, value in finished["state_dict"].items():
        assert torch.equal(value, again["state_dict"][name]), name


def test_the_last_checkpoint_is_of_the_ranks_that_the_run_ends_with(folder):
    """The last steps of a run are retracted before it is saved, not only after it."""
    run("fit", "--geolora.adapt_every=3")  # of four steps
    state = torch.load("lightning_logs/quickstart/checkpoints/last.ckpt", weights_only=True)
    assert all(not value.any() for name, value in state["state_dict"].items() if name.endswith((".K", ".L")))
    saved = next(value for name, value in state["callbacks"].items() if "GeoLoRA" in name)
    assert (saved["integrator"]["adaptations"], saved["integrator"]["total_steps"]) == (
        4,
        4,
    )  # the last takes nothing in


def parsed(capfd, *more):
    """The settings that a fit of the quickstart would have."""
    capfd.readouterr()
    with pytest.raises(SystemExit):
        run("fit", "--print_config", *more, quick=[])
    return yaml.safe_load(capfd.readouterr().out)


OPTIMIZER = "--model.init_args.optimizer"


@pytest.mark.parametrize("named", [f"{OPTIMIZER}=AdamW", f"{OPTIMIZER}.class_path=torch.optim.AdamW", "a file"])
def test_an_optimizer_that_is_named_has_its_own_defaults(folder, capfd, named):
    (folder / "adamw.yaml").write_text("model: {init_args: {optimizer: {class_path: torch.optim.AdamW}}}")
    named = "--config=adamw.yaml" if named == "a file" else named
    of_adamw = parsed(capfd, named)["model"]["init_args"]["optimizer"]["init_args"]
    assert (of_adamw["lr"], of_adamw["betas"], of_adamw["weight_decay"]) == (1e-3, [0.9, 0.999], 1e-2)


def test_a_name_means_the_class_of_torch_where_another_library_has_one_of_that_name(folder, capfd):
    """With bitsandbytes installed, ``AdamW`` was the name of several classes; torch's is the one that is meant."""
    another = type("AdamW", (torch.optim.AdamW,), {"__module__": "another"})
    config = parsed(capfd, f"{OPTIMIZER}=AdamW")
    assert config["model"]["init_args"]["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert issubclass(another, torch.optim.Optimizer)  # and is still there


def test_the_name_of_the_schedule_that_waits_for_a_plateau_means_the_one_that_knows_its_metric(folder, capfd):
    """By its name alone it was torch's, which takes no ``monitor``, and with which no fit can work."""
    scheduler = "--model.init_args.lr_scheduler"
    config = parsed(capfd, f"{scheduler}=ReduceLROnPlateau", f"{scheduler}.init_args.monitor=val_loss")
    found = config["model"]["init_args"]["lr_scheduler"]
    assert found["class_path"] == "lightning.pytorch.cli.ReduceLROnPlateau"
    assert found["init_args"]["monitor"] == "val_loss"


def test_what_was_set_for_another_optimizer_is_dropped_and_said(folder, capfd, caplog):
    config = parsed(capfd, f"{OPTIMIZER}.init_args.lr=0.1", f"{OPTIMIZER}=AdamW")
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 1e-3
    assert "lr=0.1 was set for RiemannianAdam and is dropped: AdamW takes its own" in caplog.text
    caplog.clear()
    config = parsed(capfd, f"{OPTIMIZER}.init_args.lr=0.1", f"{OPTIMIZER}=geolora_pl.training.optim.RiemannianAdam")
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.1
    assert "dropped" not in caplog.text


def test_other_data_keep_what_was_set_and_not_the_defaults_of_the_data_before(folder, capfd):
    texts = ["--data=geolora_pl.data.TextFiles", "--data.init_args.train_file=a.csv"]
    assert parsed(capfd, "--data.init_args.batch_size=8", *texts)["data"]["init_args"]["batch_size"] == 8
    assert parsed(capfd, *texts)["data"]["init_args"]["batch_size"] == TextFiles("a.csv").batch_size != 64


def results_printed(loggers, capfd):
    cli = object.__new__(GeoLoRACLI)
    cli.trainer = L.Trainer(logger=loggers, accelerator="cpu")
    cli._print_results({"test_f1[macro]": 0.5, "test_f1[/x]": 0.25})
    return capfd.readouterr().out.splitlines()


def test_names_and_folders_in_brackets_are_printed_as_they_are(folder, capfd):
    out = results_printed(CSVLogger("runs", name="x[lr=3]", version=""), capfd)
    assert out[:2] == ["test_f1[macro]: 0.5000", "test_f1[/x]: 0.2500"]
    assert out[2].endswith("report --run 'runs/x[lr=3]/'"), "as a shell takes it"


def test_a_closer_look_is_offered_where_there_is_one(folder, capfd):
    table, events = CSVLogger("runs", name="table", version=""), TensorBoardLogger("runs", name="events", version="")
    assert len(results_printed(Keeps(), capfd)) == 2
    assert [line.split()[-1] for line in results_printed([table], capfd)[2:]] == ["runs/table/"]
    tensorboard, page = results_printed([table, events], capfd)[2:]
    assert "tensorboard --logdir runs/events" in tensorboard
    assert "report --run runs/table" in page


def test_the_callbacks_settings_and_any_torch_optimizer_from_the_command_line(folder, capfd):
    run(
        "fit",
        "--geolora.tau=0.3",
        "--geolora.adapt_every=2",
        "--model.init_args.adapter.max_rank=4",
        "--model.init_args.adapter.rank_pattern={'qkv': 2}",
        "--model.init_args.optimizer=torch.optim.SGD",
        "--model.init_args.optimizer.init_args.lr=0.1",
        "--trainer.logger=false",
        "--test_after_fit=false",
    )
    out = capfd.readouterr().out
    assert "test_accuracy" not in out
    ranks = [int(r) for r in re.findall(r"│ ([\d ]+?) +│", out) for r in r.split()]
    assert len(ranks) == 16
    assert max(ranks) <= 4


def test_print_config_and_help(folder, capfd):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "configs/quickstart.yaml", "--print_config"])
    assert stop.value.code == 0
    config = yaml.safe_load(capfd.readouterr().out)
    assert config["geolora"]["tau"] == 0.3
    assert config["model"]["init_args"]["adapter"]["max_rank"] == 16
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--help"])
    assert stop.value.code == 0
    out = capfd.readouterr().out
    assert "--geolora.tau" in out
    assert "Relative truncation tolerance" in " ".join(out.split())


def test_help_of_the_task(folder, capfd):
    with pytest.raises(SystemExit):
        main(["fit", "--model.help=geolora_pl.tasks.ImageClassification"])
    out = " ".join(capfd.readouterr().out.split())
    assert "Share of the target that is spread over all classes" in out
    assert "--model.adapter.max_rank" in out or "adapter.max_rank" in out
    assert "Columns allocated for every adapter" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--geolora.ta=0.2"], "geolora.ta"),  # no abbreviations
        (["--geolora.tau=high"], "geolora.tau"),
        (["--geolora.tau=2"], "tau=2"),
        (["--trainer.max_step=3"], "max_step"),
        (["--model.init_args.label_smoothing=3"], "label_smoothing=3"),
        (["--model.init_args.adapter.init_rank=0"], "init_rank=0"),
        (["--geolora.budget=10"], "budget=10 is below the floor"),
        (["--model.init_args.checkpoint_path=gone.pth"], "checkpoint_path='gone.pth' is not a file"),
        (["--data=geolora_pl.data.ImageFolder", "--data.init_args.folder=gone"], "folder='gone' must hold"),
        (["--config=gone.yaml"], "gone.yaml"),
    ],
)
def test_bad_input_stops_before_training_and_says_why(folder, capfd, arguments, message):
    with pytest.raises((SystemExit, ValueError)) as stop:
        run("fit", *arguments)
    assert getattr(stop.value, "code", 1) != 0
    captured = capfd.readouterr()
    assert message in f"{stop.value} {captured.err}"
    assert not list(folder.glob("lightning_logs/**/*.ckpt"))


def test_the_users_own_configuration_is_never_written_over(folder):
    own = folder / "config.yaml"
    own.write_text("# mine\n" + (ROOT / "configs" / "quickstart.yaml").read_text())
    main(["fit", "--config", "config.yaml", *QUICK, *FLAGS, "--trainer.logger=false"])
    assert own.read_text().startswith("# mine")


def test_the_quickstart_prints_no_warning_of_ours(folder, recwarn):
    run("fit")
    assert not [w for w in recwarn if w.category is GeoLoRAWarning]


def test_the_csv_logger_keeps_what_was_there(tmp_path):
    for value in range(3):
        logger = CSVLogger(tmp_path, name="run", version="")
        logger.log_metrics({"a": value})
        logger.save()
    tables = [path.read_text().splitlines() for path in (tmp_path / "run").glob("metrics*.csv")]
    assert sorted(next(csv.DictReader(table))["a"] for table in tables) == ["0", "1", "2"]


@pytest.mark.parametrize("arguments", [["--version"], ["--version", "fit"]])
def test_the_version_is_that_of_the_package(arguments, capsys):
    with contextlib.suppress(SystemExit):
        main(arguments)
    assert capsys.readouterr().out.split()[-1] == geolora_pl.__version__ == version("geolora_pl")


def test_the_logger_of_lightning_itself_has_no_hp_metric(folder):
    """TensorBoard showed an hp_metric of -1 for every run."""
    run("fit", "--trainer.logger=true", "--test_after_fit=false", "--trainer.default_root_dir=run")
    (events,) = Path("run").rglob("events.out.tfevents.*")
    log = EventAccumulator(str(events))
    log.Reload()
    assert "geolora/mean_rank" in log.Tags()["scalars"]
    assert "hp_metric" not in log.Tags()["scalars"]


def test_layers_have_their_names_without_wrappers_as_in_a_report(tmp_path):
    """A part of the model was in a wrapper, such as torch.compile's: ``ranks`` names its layers as the report does."""
    model = nn.Sequential(nn.DataParallel(nn.Linear(8, 6)), nn.Linear(6, 6))
    inject_adapters(model)
    checkpoint = {"state_dict": model.state_dict(), "pytorch-lightning_version": L.__version__}
    describe_adapters(checkpoint, model)
    torch.save(checkpoint, tmp_path / "last.ckpt")
    _, adapters, _ = ranks_tables(tmp_path / "last.ckpt")
    assert [label.plain for label in adapters.columns[0].cells] == ["0", "1"]
