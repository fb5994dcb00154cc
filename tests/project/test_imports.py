"""The layering of the package: imports go down only, and each library stays in its rooms."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from layout import BELOW, FILES, LEVEL, ORDER, PACKAGE

import geolora_pl.data
import geolora_pl.tasks


def folder_of(module: str) -> str:
    """The folder, or file, of the package that a module lies in: ``math`` for ``geolora_pl.math.ranks``."""
    return module.split(".")[1]


def module_of(path: Path) -> str:
    return ".".join(("geolora_pl", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """The modules that a file imports; of ``from folder import name`` the module ``folder.name``, if it is one."""
    tree = ast.parse(path.read_text())
    plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    source = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = {f"{node.module}.{alias.name}" for node in source for alias in node.names}
    return plain | {node.module for node in source} | (names & {module_of(path) for path in FILES})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    if path.parent == PACKAGE and path.stem not in LEVEL:
        return  # the public names
    here = folder_of(module_of(path))
    for module in imports(path):
        if not module.startswith("geolora_pl."):
            continue
        there = folder_of(module)
        if (
            there == here
            or (there in BELOW and here != "data")
            or (here == "data" and there in {"lazy", "lfs", "notes", "packaged"})
        ):
            continue
        assert LEVEL.get(there, len(ORDER)) < LEVEL.get(here, -1), f"{here} imports {module}"


def test_no_circle_inside_a_folder():
    graph = {module_of(path): imports(path) for path in FILES}
    done: set[str] = set()

    def walk(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"a circle: {' -> '.join((*above, module))}"
        if module not in done:
            for other in graph.get(module, set()) & graph.keys():
                if other != module and not module.startswith(f"{other}."):
                    walk(other, (*above, module))
            done.add(module)

    for module in graph:
        walk(module, ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_each_library_stays_in_its_rooms(path):
    used = {name.partition(".")[0] for name in imports(path)}
    here = folder_of(module_of(path)) if path.parent != PACKAGE else path.stem
    if here not in {"lightning", "tasks", "cli", "data", "loggers", "notes"}:
        assert "lightning" not in used or path.stem in {"__init__", "lazy"}
    if here not in {"tasks", "data"}:
        assert not used & {"timm", "datasets", "sklearn", "torchvision"}
        assert "transformers" not in used or here == "huggingface"
    if here != "tasks":
        assert "diffusers" not in used
    if here not in {"storage", "report"}:
        assert "huggingface_hub" not in used
    if here != "report":
        assert "matplotlib" not in used


# Not ours to avoid: Lightning imports torchmetrics, and that transformers (up to 5.20, the last for Python 3.10: with
# sklearn, which imports pandas, and that pyarrow), torchvision, scipy and matplotlib.
OF_LIGHTNING = {
    "lightning",
    "torchmetrics",
    "transformers",
    "sklearn",
    "torchvision",
    "scipy",
    "matplotlib",
    "jsonargparse",
}
OF_TASKS = {"timm", "diffusers", "datasets", "pandas", "pyarrow", "tensorboard"}


# From the fewest libraries to the most: one process takes the steps one after the other, for it starts in seconds.
STEPS = [
    ("import geolora_pl; geolora_pl.__version__", OF_LIGHTNING | OF_TASKS | {"torch"}),
    ("from geolora_pl.cli.dispatch import main; main(['--version'])", OF_LIGHTNING | OF_TASKS | {"torch"}),
    (
        "from geolora_pl import AdapterLibrary, RankAdaptiveIntegrator, RiemannianAdam, push_to_hub, save_adapter",
        OF_LIGHTNING | OF_TASKS,
    ),
    ("from geolora_pl.storage.hub import is_repo_id; assert is_repo_id('user/name')", OF_LIGHTNING | OF_TASKS),
    ("from geolora_pl.cli.dispatch import main; main(['ranks', '--help'])", OF_LIGHTNING | OF_TASKS),
    ("from geolora_pl import GeoLoRACallback, GeoLoRAModule, predict", OF_TASKS),
    ("from geolora_pl.cli.dispatch import main; sys.argv[1:] = ['--help']; main()", OF_TASKS),
    ("from geolora_pl.cli.dispatch import main; sys.argv[1:] = ['fit', '--help']; main()", OF_TASKS),
]
# What a kind of task is made of, and the libraries of the others.
TASKS = [
    (
        "geolora_pl.tasks.TextClassification, geolora_pl.data.GLUE, geolora_pl.data.TextFiles, "
        "geolora_pl.tasks.CausalLM, geolora_pl.data.LanguageFiles, "
        "geolora_pl.tasks.TokenClassification, geolora_pl.data.TagFiles, "
        "geolora_pl.tasks.QuestionAnswering, geolora_pl.data.AnswerFiles, "
        "geolora_pl.tasks.Seq2SeqLM, geolora_pl.data.Seq2SeqFiles",
        ["timm", "sklearn", "diffusers"],
    ),
    (
        "geolora_pl.tasks.ImageClassification, geolora_pl.data.Digits",
        ["transformers", "diffusers", "datasets", "sklearn"],
    ),
]
# After the steps each kind of task is tried in a fork, in which Lightning is there already.
LOOK = """
import contextlib, io, json, os, sys
# transformers imports them where they are, and torchao writes to stderr.
sys.modules.update(dict.fromkeys(["torchao", "bitsandbytes"]))
steps, tasks = json.load(sys.stdin)
for code, unused in steps:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            exec(code)
        except SystemExit as stop:
            assert stop.code == 0, code
    of_sklearn = {"pandas", "pyarrow"} if "sklearn" in sys.modules else set()
    print(json.dumps([out.getvalue()[:6], sorted(sys.modules.keys() & set(unused) - of_sklearn)]), flush=True)
for names, hidden in tasks:
    if not (child := os.fork()):
        sys.modules.update(dict.fromkeys(hidden))  # what is None there cannot be imported
        import geolora_pl.tasks, geolora_pl.data
        exec(names)
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def looked(steps, tasks=()):
    """Take steps in a process that does nothing else, each without what it does not need; how the tasks ended."""
    unused = [(code, sorted(libraries)) for code, libraries in steps]
    command = [sys.executable, "-W", "error::UserWarning", "-c", LOOK]
    done = subprocess.run(command, input=json.dumps([unused, tasks]), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.split() == []
    lines = done.stdout.splitlines()
    for (code, _), line in zip(steps, lines[: len(steps)], strict=True):
        printed = "usage:" if "help" in code else "geolor" if "main" in code else ""
        assert json.loads(line) == [printed, []], code
    return lines[len(steps) :]


def test_the_version_is_told_without_torch():
    assert looked(STEPS[:2]) == []


@pytest.mark.slow
def test_nothing_is_imported_that_is_not_needed_and_a_task_needs_the_libraries_of_no_other():
    assert looked(STEPS, TASKS) == ["0", "0"]


def test_a_missing_extra_is_named(monkeypatch):
    for package, name in ((geolora_pl.tasks, "TextClassification"), (geolora_pl.data, "GLUE")):
        for module in [module for module in sys.modules if module.startswith(package.__name__ + ".")]:
            monkeypatch.delitem(sys.modules, module)
        for library in ("datasets", "transformers"):
            monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(ImportError, match=rf"{package.__name__}.{name} needs .*pip install 'geolora_pl\[text\]'"):
            getattr(package, name)


@pytest.mark.parametrize("package", [geolora_pl, geolora_pl.tasks, geolora_pl.data])
def test_every_exported_name_is_there_and_no_other(package):
    assert all(getattr(package, name).__name__ == name for name in package.__all__)
    assert len(package.__all__) >= 3
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'Absent'"):
        _ = package.Absent


def test_no_file_is_longer_than_400_lines():
    long = {str(path): n for path in FILES if (n := len(path.read_text().splitlines())) > 400}
    assert not long
