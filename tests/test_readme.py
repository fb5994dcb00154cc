"""The README's snippets run and its commands exist."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from geolora_pl.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


@pytest.mark.filterwarnings("ignore")  # Lightning's, about loaders without workers
def test_the_python_snippets_run_one_after_the_other(monkeypatch, tmp_path):
    from lightning.pytorch import Trainer

    original = Trainer.__init__
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    monkeypatch.setattr(Trainer, "__init__", lambda self, **kwargs: original(self, **{**quiet, **kwargs}))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    snippets = blocks("python")
    assert len(snippets) == 6
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    assert set(names["integrator"].ranks()) == {"0"}


def test_the_commands_are_understood(tmp_path, monkeypatch, capfd):
    makefile = (ROOT / "Makefile").read_text()
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]
    assert len(commands) == 14
    for program, *arguments in commands:
        if program == "make":
            assert all(re.search(rf"^{target}:", makefile, re.M) for target in arguments)
            continue
        assert arguments[:2] == ["-m", "geolora_pl"]
        if arguments[2] in {"export", "ranks"}:  # understood, but for the checkpoint that is not there
            with pytest.raises(SystemExit) as stop:
                main(arguments[2:])
            assert "last.ckpt' is no file" in capfd.readouterr().err
            continue
        with pytest.raises(SystemExit) as stop:
            main([*arguments[2:], "--print_config"])
        assert stop.value.code == 0, capfd.readouterr().err


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: re.search(r"data\.(\w+)", block)[1])
def test_the_yaml_for_own_data_is_a_configuration(block, tmp_path, monkeypatch, capfd):
    (tmp_path / "own.yaml").write_text(block)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "own.yaml", "--print_config"])
    assert stop.value.code == 0, capfd.readouterr().err


def test_the_promised_tests_exist():
    promised = re.findall(r"`(test_\w+\.py)::(test_\w+)`", README)
    assert len(promised) >= 10
    for file, name in promised:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), name


def test_the_tables_are_those_of_the_committed_results():
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "benchmarks" / "readme_tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for document in tables.DOCUMENTS:
        text = document.read_text()
        assert "| geolora_pl |" in text
        assert tables.with_tables(text) == text
