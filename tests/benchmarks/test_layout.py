"""The benchmarks import only what they may, their scripts start by their path, and results name such scripts."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
FILES = sorted(BENCHMARKS.rglob("*.py"))
SCRIPTS = [path for path in FILES if '__name__ == "__main__"' in path.read_text()]


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path):
    """The modules of the benchmarks that a file imports."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    names = {name for node in nodes for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))}
    return names & {module_of(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_folder_imports_itself_and_what_is_shared(path):
    if path.parent != BENCHMARKS:
        assert {module.split(".")[1] for module in imports(path)} <= {path.parent.name, "shared"}


def test_no_imports_go_in_a_circle():
    graph = {module_of(path): imports(path) for path in FILES}
    while graph:
        free = {module for module, needed in graph.items() if not needed & graph.keys()}
        assert free, f"a circle among {sorted(graph)}"
        graph = {module: needed for module, needed in graph.items() if module not in free}


# All scripts in one process, which imports the large libraries once, but every time without the folder of the project.
HELP = """
import contextlib, io, runpy, sys
before = [entry for entry in sys.path if entry not in ("", sys.argv[1])]
for script in sys.argv[2:]:
    sys.path[:] = before
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]
    sys.argv = [script, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as stop:
            assert stop.code == 0, script
    assert out.getvalue().startswith("usage: "), script
"""


@pytest.mark.slow
def test_every_script_starts_by_its_path_and_says_what_it_does(tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-c", HELP, str(ROOT), *map(str, SCRIPTS)]
    assert len(SCRIPTS) > 10
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "results").iterdir()), ids=lambda path: path.name)
def test_the_command_of_a_result_is_a_script(path):
    text = path.read_text()
    records = map(json.loads, text.splitlines()) if path.suffix == ".jsonl" else [json.loads(text)]
    for record in records:
        script = re.match(r"python (\S+\.py)", record["command"])[1]
        assert (ROOT / script) in SCRIPTS, script
