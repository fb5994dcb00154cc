"""The README's snippets run, its commands and tables are right, and what it promises is tested."""

import re
import sys
from dataclasses import fields
from inspect import signature

import pytest
from pages import ROOT, blocks, commands, of_the_command_line, quiet_trainers, understood
from peft import AdaLoraConfig, LoraConfig

import geolora_pl.data
import geolora_pl.tasks
from benchmarks import write_tables
from geolora_pl import AdapterConfig
from geolora_pl.adapters.elsewhere import PEFT
from geolora_pl.cli.start import STARTS

pytestmark = pytest.mark.usefixtures("one_parser")
PAGE = ROOT / "README.md"


def test_the_python_snippets_run_one_after_the_other(monkeypatch, tmp_path):
    quiet_trainers(monkeypatch)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    snippets = blocks(PAGE, "python")
    assert len(snippets) == 2
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    assert set(names["callback"].integrator.ranks()) == {"body.0", "body.2"}


def test_the_commands_are_understood(tmp_path, monkeypatch, capfd):
    makefile = (ROOT / "Makefile").read_text()
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["geolora_pl"])
    calls = commands(PAGE, tmp_path)
    assert len(calls) == 19
    for program, *arguments in calls:
        if program == "make":
            assert all(re.search(rf"^{target}:", makefile, re.M) for target in arguments)
        elif program == "source":
            assert arguments == [".venv/bin/activate"]
        else:
            understood(of_the_command_line(program, arguments), capfd)


@pytest.mark.parametrize(
    "block", blocks(PAGE, "yaml"), ids=lambda block: re.search(r"^data:\n  class_path: (\w+)", block, re.M)[1]
)
def test_the_yaml_for_own_data_is_a_configuration_of_ten_lines(block, tmp_path, monkeypatch, capfd):
    assert len(block.splitlines()) <= 10
    (tmp_path / "own.yaml").write_text(block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["geolora_pl"])
    understood(["fit", "--config", "own.yaml"], capfd)


def test_there_are_three_kinds_of_own_data():
    assert len(blocks(PAGE, "yaml")) == 3


def test_the_table_of_tasks_has_every_task_and_every_configuration_to_start_from():
    """A user saw in the README neither ``init chat`` nor some of the tasks: the table has all that there is."""
    table = re.search(r"^\| you have \|.*?\n\n", PAGE.read_text(), re.M | re.S)[0]
    cells = set(re.findall(r"`([^`]*)`", table))
    named = {name for name in geolora_pl.data.__all__ if name.endswith(("Files", "Hub", "Folder", "Table"))}
    assert {*geolora_pl.tasks.__all__, *named} <= cells
    assert {cell for cell in cells if cell.startswith("init ")} == {f"init {task}" for task in STARTS}
    listed = re.search(r"`init` writes a commented YAML for (.*?), and never", PAGE.read_text(), re.S)[1]
    assert set(re.findall(r"`(\w+)`", listed)) == set(STARTS)


def test_the_table_for_those_who_come_from_peft_says_what_the_errors_say():
    section = re.search(r"^## Coming from PEFT\n(.*?)(?=^## )", PAGE.read_text(), re.M | re.S)[1]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|$", section, re.M))
    same = [name for name, said in rows.items() if said.startswith("the same")]
    assert set(same) <= {field.name for field in fields(AdapterConfig)} & set(signature(LoraConfig).parameters)
    assert {"target_modules", "modules_to_save"} <= set(same)
    others = {name: said.replace("`", "") for name, said in rows.items() if name not in same}
    assert others == {name: str(ours) for name, ours in PEFT.items()}
    assert others.keys() <= set(signature(AdaLoraConfig).parameters)


@pytest.mark.parametrize(("page", "least"), [(PAGE, 15), (ROOT / "docs/promises.md", 40)], ids=["README", "promises"])
def test_the_promised_tests_exist(page, least):
    text = page.read_text()
    promised = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    assert len(promised) >= least
    for file, name in promised:
        (path,) = (ROOT / "tests").rglob(file)
        assert f"def {name}(" in path.read_text(), name
    for tool in re.findall(r"`python (tools/\w+\.py)`", text):
        assert (ROOT / tool).is_file()


def test_the_tables_are_those_of_the_committed_results():
    for document in write_tables.DOCUMENTS:
        text = document.read_text()
        assert "| geolora_pl |" in text
        assert write_tables.with_tables(text) == text
