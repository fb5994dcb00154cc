"""A first use without the repository: the script, the quickstart, configurations to start from, names, completion."""

import re
import subprocess
import sys

import pytest
import yaml
from flags import FLAGS

from geolora_pl.cli import dispatch, start
from geolora_pl.cli.dispatch import COMMANDS, command_line, main
from geolora_pl.packaged import in_package

pytestmark = pytest.mark.usefixtures("one_parser")
LIMITS = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1, "limit_test_batches": 1}
SHORT = [*(f"--trainer.{name}={value}" for name, value in (LIMITS | {"log_every_n_steps": 1}).items()), *FLAGS]


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """An empty working folder, far from the repository."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_quickstart_runs_in_an_empty_folder(empty, capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/geolora-pl"])
    main(["quickstart", *SHORT])
    out = capfd.readouterr().out
    assert re.search(r"test_accuracy: 0\.\d{4}", out)
    assert "geolora-pl report --run lightning_logs/quickstart" in out
    assert [path.name for path in empty.iterdir()] == ["lightning_logs"]


@pytest.mark.parametrize("task", start.STARTS)
def test_init_writes_a_configuration_that_fit_understands_and_never_writes_over_one(empty, capfd, monkeypatch, task):
    main(["init", task])
    said = capfd.readouterr().out
    assert said.startswith(f"{task}.yaml is written")
    assert f"python -m geolora_pl fit --config {task}.yaml" in said
    text = (empty / f"{task}.yaml").read_text()
    assert f"#   geolora-pl fit --config {task}.yaml" in text
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={task}.yaml", "--print_config"])
    assert stop.value.code == 0
    config = yaml.safe_load(capfd.readouterr().out)
    assert config["model"]["class_path"] == f"geolora_pl.tasks.{yaml.safe_load(text)['model']['class_path']}"

    (empty / f"{task}.yaml").write_text("mine")
    with pytest.raises(SystemExit):
        main(["init", task])
    assert re.match(
        r"error: output='\w+\.yaml' is there already, and is kept: name .* --output", capfd.readouterr().err
    )
    assert (empty / f"{task}.yaml").read_text() == "mine"


def test_a_name_of_a_class_is_a_class_path(empty, capfd):
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "fit",
                "--model=TextClassification",
                "--model.model_name=x",
                "--data=ImageFolder",
                "--data.folder=y",
                "--print_config",
            ]
        )
    assert stop.value.code == 0
    config = yaml.safe_load(capfd.readouterr().out)
    assert config["model"]["class_path"] == "geolora_pl.tasks.TextClassification"
    assert config["data"]["class_path"] == "geolora_pl.data.ImageFolder"


def test_a_slip_in_the_name_of_a_class_is_answered_by_the_nearest(empty, capfd):
    with pytest.raises(SystemExit):
        main(["fit", "--data=ImageFoldr"])
    assert "did you mean 'ImageFolder'?" in capfd.readouterr().err


@pytest.mark.parametrize("script", ["/usr/bin/geolora-pl", "geolora-pl.exe"])
def test_help_and_hints_name_the_script_that_was_called(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    command_line()
    assert capsys.readouterr().out.startswith("usage: geolora-pl COMMAND")
    monkeypatch.setattr(sys, "argv", [script, "ranks", "--help"])
    with pytest.raises(SystemExit):
        command_line()
    assert capsys.readouterr().out.startswith("usage: geolora-pl ranks ")


# What other tasks and their data need, what only tests need, and what reads tables.
HEAVY = {
    "accelerate",
    "bitsandbytes",
    "datasets",
    "diffusers",
    "huggingface_hub",
    "matplotlib",
    "pandas",
    "peft",
    "pyarrow",
    "sklearn",
    "tokenizers",
    "torchao",
    "transformers",
}
OF_LIGHTNING = {"lightning", "scipy", "torch", "torchmetrics", "torchvision"}


def imported_by(code):
    """The libraries of which a process imports modules, beyond those that it has before a line ``before = ...``."""
    script = f"import sys; before = set(); sys.argv[1:] = []\n{code}\nprint(*(sys.modules.keys() - before))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=400)
    return {module.partition(".")[0] for module in done.stdout.splitlines()[-1].split()}


def test_help_imports_none_of_the_heavy_libraries():
    """Help cost seven seconds: it must need nothing but the standard library."""
    assert not imported_by("from geolora_pl.cli.dispatch import main; main(['--help'])") & (HEAVY | OF_LIGHTNING)


@pytest.mark.slow
def test_a_fit_of_images_imports_no_library_of_another_task(empty):
    """The quickstart imported scikit-learn, and with it pandas, to read one table of numbers.

    Lightning imports torchmetrics, and that transformers and matplotlib where they are installed; the fit imports no
    further module of these, either.
    """
    lightning = "import lightning, huggingface_hub; before = set(sys.modules)"  # timm needs the client of the hub
    fit = f"from geolora_pl.cli.dispatch import main; main({['quickstart', *SHORT]})"
    used = imported_by(f"{lightning}\n{fit}")
    assert {"timm", "geolora_pl"} <= used
    assert not used & HEAVY


def completed(script, *words):
    """What bash offers for the last of the words."""
    line = " ".join(f'"{word}"' for word in words)
    asked = (
        f'{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _geolora_pl; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    return subprocess.run(["bash", "-c", asked], check=True, capture_output=True, text=True).stdout.split()


def test_bash_completes_commands_and_options(capsys, monkeypatch):
    main(["completion", "bash"])
    script = capsys.readouterr().out
    assert completed(script, "geolora-pl", "") == sorted(COMMANDS)
    assert completed(script, "geolora-pl", "fit", "--geolora.ta") == ["--geolora.tau"]
    assert completed(script, "geolora-pl", "quickstart", "--trainer.max_ep") == ["--trainer.max_epochs"]
    assert completed(script, "geolora-pl", "export", "--form") == ["--format"]
    assert set(start.STARTS) <= set(completed(script, "geolora-pl", "init", ""))
    assert completed(script, "geolora-pl", "fit", "my.ya") == []  # files, by the shell itself
    assert completed(script, "geolora-pl", "push", "--sou") == ["--source"]  # without the full stop after it
    assert [word for word in completed(script, "geolora-pl", "fit", "") if not word.startswith("-")] == []
    monkeypatch.setattr(dispatch, "_train", lambda given: None)
    main(["completion", "zsh"])
    assert capsys.readouterr().out.startswith("autoload -U +X compinit bashcompinit")


def test_a_process_that_is_asked_for_the_quickstart_fits_without_a_warning_about_its_arguments(
    empty, monkeypatch, capfd
):
    """A user of the installed script was warned of arguments that he had not given."""
    monkeypatch.setattr(sys, "argv", ["geolora-pl", "quickstart", "--print_config"])
    with pytest.raises(SystemExit) as stop:
        command_line()
    assert stop.value.code == 0
    assert yaml.safe_load(capfd.readouterr().out)["data"]["class_path"] == "geolora_pl.data.Digits"
    assert sys.argv[:3] == ["geolora-pl", "fit", "--config"]


def test_own_classes_are_found_where_the_command_is_called(tmp_path, monkeypatch):
    """A console script has its own folder in the path, and not the working folder, as `python -m` has."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path != ""])
    monkeypatch.setattr("sys.argv", ["geolora-pl", "--version"])
    command_line()
    assert sys.path[0] == str(tmp_path)


@pytest.mark.parametrize("name", ["pkg://geolora_pl//etc/passwd", "pkg://geolora_pl/../x", "pkg://__main__/x"])
def test_a_file_of_a_package_lies_inside_of_it(name):
    with pytest.raises(ValueError, match=r"leads out of the package|no package"):
        in_package(name, "config")
