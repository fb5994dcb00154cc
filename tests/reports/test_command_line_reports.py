"""What users have reported of the command line, each as it must be."""

import os
import re
from pathlib import Path

import pytest
import yaml
from flags import LIMITS
from torch.utils.data import DataLoader, Dataset

from geolora_pl.cli import dispatch
from geolora_pl.cli.dispatch import main
from geolora_pl.cli.mistakes import one_line

pytestmark = pytest.mark.usefixtures("one_parser")
ROOT = Path(__file__).parents[2]
SMALL = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text()) | {
    "trainer": {**LIMITS, "logger": False},
    "test_after_fit": False,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a quick configuration, in which a user has files of his own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    (tmp_path / "config.yaml").write_text("precious: true\n")
    return tmp_path


def fit(*more):
    main(["fit", "--config=small.yaml", *more])


def said_of(capfd, *more):
    """What is said of a setting that is wrong."""
    with pytest.raises(SystemExit) as stop:
        fit(*more)
    assert stop.value.code == 2
    return capfd.readouterr().err.removeprefix("error: ").splitlines()


# A run writes into a folder of its own


def test_a_run_without_a_logger_leaves_the_working_folder_alone(folder):
    """A user trained with logger=false beside a config.yaml of his own, which was replaced. It stays."""
    before = sorted(os.listdir(folder))
    fit()
    assert (folder / "config.yaml").read_text() == "precious: true\n"
    assert sorted(os.listdir(folder)) == sorted([*before, "lightning_logs"])
    assert "max_epochs: 1" in (folder / "lightning_logs" / "config.yaml").read_text()


HERE = "{class_path: geolora_pl.loggers.CSVLogger, init_args: {save_dir: ., name: '', version: ''}}"


@pytest.mark.parametrize("where", ["--trainer.default_root_dir=.", f"--trainer.logger={HERE}"])
def test_a_configuration_that_no_fit_has_saved_is_kept(folder, where):
    """A logger wrote to the working folder, and the user's config.yaml was replaced. It is kept, and that is said."""
    with pytest.warns(UserWarning, match=r"config\.yaml was not saved by a fit and is kept.*folder of its own"):
        fit(where)
    assert (folder / "config.yaml").read_text() == "precious: true\n"


def test_a_configuration_of_an_earlier_fit_is_replaced(folder):
    """Two runs of one name share a folder, and config.yaml is that of the last one, as the README says."""
    for epochs in (1, 2):
        fit("--trainer.default_root_dir=run", f"--trainer.max_epochs={epochs}")
    assert "max_epochs: 2" in (folder / "run" / "config.yaml").read_text()


def test_a_fit_that_is_refused_leaves_the_configuration_of_the_run_alone(folder):
    """A user went on from a checkpoint with another alpha, which is refused: the run had lost its configuration."""
    keep = "--trainer.callbacks={class_path: ModelCheckpoint, init_args: {filename: last}}"
    fit(keep)
    (config,) = folder.rglob("lightning_logs/config.yaml")
    before = config.read_text()
    (last,) = folder.rglob("last.ckpt")
    with pytest.raises(ValueError, match=r"alpha=2\.0 does not fit the checkpoint"):
        fit(keep, f"--ckpt_path={last}", "--model.init_args.adapter.alpha=2.0", "--trainer.max_epochs=2")
    assert config.read_text() == before


def test_a_logger_without_a_folder(folder):
    """A logger with save_dir=null ended in an AssertionError without a text. The run goes on, and one line says why."""
    with pytest.warns(UserWarning, match=r"config\.yaml is not saved: no logger has a folder"):
        fit("--trainer.logger=kept.Keeps", "--trainer.default_root_dir=run")


# What is wrong is said in one line, with the name that was meant


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--model.init_args.adapter.rank=8", r"'adapter\.rank' .*did you mean 'adapter\.init_rank'\?"),
        ("--model.init_args.adapter.r=8", r"'adapter\.r' .*did you mean 'adapter\.init_rank'\?"),
        ("--model.init_args.adapter.lora_alpha=8", r"did you mean 'adapter\.alpha'\?"),
        ("--model.init_args.adapter.bias=all", r"did you mean 'adapter\.train_bias'\?"),
        ("--model.init_args.lr=1", r"did you mean 'optimizer\.init_args\.lr'\?"),
        ("--optimizer=SGD", r"no setting 'optimizer': did you mean 'model\.init_args\.optimizer'\?"),
        ("--lr_scheduler=StepLR", r"did you mean 'model\.init_args\.lr_scheduler'\?"),
        ("--trainer.logger=TensorBoardLogger", r"TensorBoardLogger: the following arguments are required: save_dir"),
        ("--trainer.callbacks=EarlyStoping", r"trainer\.callbacks=EarlyStoping is not a class .* give its path"),
        ("--trainer.callbacks=EarlyStopping", r"EarlyStopping: the following arguments are required: monitor"),
    ],
)
def test_a_name_of_elsewhere_is_led_to_ours(folder, capfd, setting, message):
    """A user took the names of PEFT or of Lightning's command line. The error names ours, and guesses no other."""
    said, see = said_of(capfd, setting)
    assert re.search(message, said), said
    assert re.fullmatch("see: python -m geolora_pl (fit )?--help", see)


def test_an_optimizer_at_the_top_of_a_configuration(folder, capfd):
    """A configuration of Lightning's command line had optimizer at its top. The error says where it goes."""
    (folder / "own.yaml").write_text("optimizer: {class_path: torch.optim.SGD}\n")
    said, _ = said_of(capfd, "--config=own.yaml")
    assert said.endswith("did you mean 'model.init_args.optimizer'?")


def test_a_class_of_a_name_that_several_have(folder, capfd):
    """CSVLogger is Lightning's and ours, and the error asked for an Iterable. It names both."""
    (folder / "own.yaml").write_text(f"trainer: {{logger: {HERE}}}\n")
    said, _ = said_of(capfd, "--config=own.yaml", "--trainer.logger=CSVLogger")
    assert (
        "is the name of several classes: give the path of one, lightning.pytorch.loggers.CSVLogger or geolora" in said
    )


def test_a_callback_of_this_package_is_known_by_its_name(folder):
    """A user wrote GeoLoRAEMAWeightAveraging where Lightning's callbacks go by their names alone, and was refused."""
    fit("--trainer.callbacks+=GeoLoRAEMAWeightAveraging", "--trainer.callbacks.decay=0.9")
    (config,) = folder.rglob("lightning_logs/config.yaml")
    assert "class_path: geolora_pl.GeoLoRAEMAWeightAveraging" in config.read_text()


def test_the_nearest_name_of_a_model_is_the_one_that_was_meant(folder):
    """A slip in vit_tiny_patch16_224 was answered by convit_base. The nearest name comes first."""
    with pytest.raises(ValueError, match="similar names are: vit_tiny_patch16_224,"):
        fit("--model.init_args.model_name=vit_tiny_patch16_223")


@pytest.fixture
def process(monkeypatch, capfd):
    """Runs the command line as a process does; the status and what it said on stderr."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["__main__.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            dispatch.command_line()
        return stop.value.code, capfd.readouterr().err

    return run


@pytest.mark.parametrize(
    ("setting", "message"),
    [("--geolora.tau=1.5", "tau=1.5 must lie in [0, 1)"), ("--ckpt_path=gone.ckpt", "ckpt_path='gone.ckpt' is not a")],
)
def test_a_mistake_is_one_line_and_a_traceback_comes_on_request(folder, process, monkeypatch, setting, message):
    """A mistake in fit was buried in 53 lines of traceback. It is one line, and GEOLORA_TRACEBACK=1 shows the rest."""
    status, said = process("fit", "--config=small.yaml", setting)
    assert status == 1
    *_, error, see = said.strip().splitlines()
    assert error.startswith(f"error: {message}")
    assert "GEOLORA_TRACEBACK=1" in see
    assert "Traceback" not in said
    monkeypatch.setenv("GEOLORA_TRACEBACK", "1")
    with pytest.raises(ValueError, match=re.escape(message)):
        dispatch.command_line()


class Unreadable(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        try:
            raise OSError("cut short")
        except OSError as error:
            raise ValueError("a.png cannot be read: it is cut short;\nreplace it") from error


@pytest.mark.usefixtures("one_thread")
def test_a_mistake_that_a_process_of_a_loader_finds_is_one_line(capfd):
    """An image was cut short, and its name came at the end of the traceback of the loader's process, all in a line."""
    with pytest.raises(SystemExit), one_line():
        next(iter(DataLoader(Unreadable(), num_workers=1)))
    assert capfd.readouterr().err == "error: a.png cannot be read: it is cut short; replace it\n"


def test_a_defect_keeps_its_traceback(monkeypatch):
    """An error in somebody's code is not a mistake in a setting, and its traceback is what is needed."""

    def broken():
        raise KeyError("broken")

    monkeypatch.setattr(dispatch, "main", broken)
    with pytest.raises(KeyError, match="broken"):
        dispatch.command_line()


def test_help_lists_every_command_and_can_be_called_as_it_says(capsys):
    """Help said __main__.py, left out three commands and stopped in mid-sentence. It lists all."""
    main(["--help"])
    out = capsys.readouterr().out
    assert "__main__" not in out
    listed = re.findall(r"^  (\w+) +\w.*\w$", out, re.M)
    assert listed == list(dispatch.COMMANDS)
    for command in ("fit", "ranks"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert re.match(rf"usage: python -m geolora_pl (\[options\] )?{command} ", capsys.readouterr().out)


# What is evaluated, and what is written


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_what_was_not_trained_is_not_evaluated(folder, command):
    """A user forgot --ckpt_path, and read the accuracy of a random head. The command asks for the checkpoint."""
    with pytest.raises(ValueError, match=rf"ckpt_path=None: {command} would use a new head.*by --ckpt_path"):
        main([command, "--config=small.yaml", "--output=p.csv"])


def test_predictions_that_nothing_would_keep_are_not_made(folder):
    """A user forgot --output, and hours of predictions were thrown away. The command asks for it before the work."""
    fit("--trainer.default_root_dir=run")
    (last,) = Path("run").rglob("*.ckpt")
    with pytest.raises(ValueError, match="nothing would keep the predictions: name a file or folder by --output"):
        main(["predict", "--config=small.yaml", f"--ckpt_path={last}"])
    writer = "--trainer.callbacks+={class_path: geolora_pl.PredictionWriter, init_args: {output: p.jsonl}}"
    main(["predict", "--config=small.yaml", f"--ckpt_path={last}", writer])
    assert Path("p.jsonl").is_file()


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_an_output_that_is_not_written_is_refused(folder, command):
    """A user gave --output to test, and found no file. Only predict takes it."""
    with pytest.raises(ValueError, match=f"output='p.csv' is what predict writes: leave it out of {command}"):
        main([command, "--config=small.yaml", "--output=p.csv", "--ckpt_path=last"])
