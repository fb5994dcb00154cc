"""The snippets of a page, and what its commands call."""

import re
import subprocess
from pathlib import Path

import lightning as L
import pytest

from geolora_pl.cli.dispatch import main

ROOT = Path(__file__).parents[2]
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}
PROGRAMS = ("python", "geolora-pl", "make", "source", "tensorboard", "torchrun")


def blocks(page: Path, language: str) -> list[str]:
    """The code of a language, block by block."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def commands(page: Path, folder: Path) -> list[list[str]]:
    """What the page's shell calls, as bash understands it: loops are run and variables filled in."""
    stubs = [f'{name}() {{ printf "%s\\n" $(($# + 1)) {name} "$@" >>calls; }}' for name in PROGRAMS]
    script = "\n".join([*stubs, *blocks(page, "bash")])
    subprocess.run(["bash", "-euc", script], cwd=folder, check=True, timeout=280)
    words = (folder / "calls").read_text().splitlines()
    calls = []
    while words:
        count = int(words.pop(0))
        calls.append(words[:count])
        words = words[count:]
    return calls


def of_the_command_line(program: str, arguments: list[str]) -> list[str]:
    """What a call gives to the command line of this package; nothing for a call of something else."""
    if program == "geolora-pl":
        return arguments
    if "geolora_pl" not in arguments:
        return []
    place = arguments.index("geolora_pl")
    assert arguments[place - 1] == "-m"
    return arguments[place + 1 :]


def understood(arguments: list[str], capfd) -> None:
    """The command line takes the arguments, but for a checkpoint or a run that is not there."""
    if arguments[0] in ("init", "completion") or arguments == ["--help"]:
        main(arguments)
        return
    missing = {
        "export": "last.ckpt' is not a file",
        "push": "' is neither a file nor a folder",
        "ranks": "last.ckpt' is not a file",
        "report": "' is not a folder",
        "shrink": " is not a file",
    }
    about = missing.get(arguments[0])
    with pytest.raises(SystemExit) as stop:
        main(arguments if about else [*arguments, "--print_config"])
    said = capfd.readouterr().err
    if about:
        assert about in said, said
    else:
        assert stop.value.code == 0, f"{arguments}: {said}"


def quiet_trainers(monkeypatch) -> None:
    """Trainers of the snippets run on the CPU and leave nothing behind."""
    original = L.Trainer.__init__
    settings = {**QUIET, "accelerator": "cpu"}
    monkeypatch.setattr(L.Trainer, "__init__", lambda self, **kwargs: original(self, **{**settings, **kwargs}))
