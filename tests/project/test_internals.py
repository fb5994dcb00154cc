"""Private names of other libraries: each is there, and used in the file that the page of the architecture names."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
from layout import FILES, PACKAGE

PAGE = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()
TABLE = PAGE.partition("## Private names of other libraries")[2]
ROWS = re.findall(r"^\| `([\w.]+)` \| `([\w/]+)`(, overridden)? \|", TABLE, re.M)
OF_TUPLES = {"_asdict", "_fields", "_replace"}  # public in spite of the underscore


def last(name):
    return name.rpartition(".")[2]


def is_there(name):
    """Whether a dotted name leads somewhere; an attribute of instances stands in the source of their class."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:-1]:
            owner = getattr(owner, part, None)
        if hasattr(owner, parts[-1]):
            return True
        return isinstance(owner, type) and any(
            re.search(rf"self\.{parts[-1]}\b", inspect.getsource(base)) for base in owner.__mro__[:-1]
        )
    return False


@pytest.mark.parametrize("name", [name for name, _, _ in ROWS])
def test_a_private_name_is_still_there(name):
    assert is_there(name), f"{name} is gone in this version: {TABLE.partition(f'`{name}` | ')[2].splitlines()[0]}"


def test_a_name_that_is_gone_is_noticed():
    assert not is_there("lightning.fabric.utilities.seed._gone")
    assert not is_there("lightning.pytorch.trainer.trainer.Trainer._gone")
    assert not is_there("jsonargparse._gone.discard")


def is_private(name):
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__")) and name not in OF_TUPLES


def defined(tree):
    """The private names that a file gives to functions, classes, variables and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def used(tree):
    """The private names that a file takes from other modules and objects."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("geolora_pl"):
            yield from (name for name in ((node.module or "").split(".")) if is_private(name))
            yield from (alias.name for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split(".") if is_private(part))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            own = isinstance(node.value, ast.Name) and node.value.id == "self"
            if isinstance(node.ctx, ast.Load) or not own:  # an attribute of something else may be set as well
                yield node.attr


def overridden(path):
    """The private names of other libraries that the classes of a file define again."""
    module = importlib.import_module(".".join(("geolora_pl", *path.relative_to(PACKAGE).with_suffix("").parts)))
    own = [cls for cls in vars(module).values() if isinstance(cls, type) and cls.__module__ == module.__name__]
    for cls in own:
        foreign = [base for base in cls.__mro__[1:-1] if not base.__module__.startswith("geolora_pl")]
        for name in filter(is_private, vars(cls).keys() & set(defined(TREES[path]))):
            if any(name in vars(base) for base in foreign):
                yield name


TREES = {path: ast.parse(path.read_text()) for path in FILES if path.name not in ("__init__.py", "__main__.py")}
OURS = {name for tree in TREES.values() for name in defined(tree)} - {last(name) for name, _, again in ROWS if again}
OF_FILE = {}
for _name, _file, _ in ROWS:
    OF_FILE.setdefault(PACKAGE / f"{_file}.py", set()).update(filter(is_private, _name.split(".")))


@pytest.mark.parametrize("path", TREES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_private_name_of_a_library_is_used_behind_its_door_alone(path):
    foreign = (set(used(TREES[path])) - OURS) | set(overridden(path))
    unnamed = foreign - OF_FILE.get(path, set())
    assert not unnamed, f"{', '.join(sorted(unnamed))}: into internals.py of this folder, and into docs/architecture.md"


def test_every_row_of_the_page_is_needed():
    assert len(ROWS) > 30
    for name, file, _ in ROWS:
        path = PACKAGE / f"{file}.py"
        deepest = [part for part in name.split(".") if is_private(part)][-1]
        assert deepest in set(used(TREES[path])) | set(overridden(path)), name


@pytest.mark.parametrize("library", sorted({name.partition(".")[0] for name, _, _ in ROWS} - {"argparse"}))
def test_a_library_whose_private_names_are_used_has_a_ceiling(library):
    text = (PACKAGE.parent / "pyproject.toml").read_text()
    assert re.search(rf'^    "{library}(\[\w+\])?>=[\d.]+,<[\d.]+"', text, re.M)
