"""The files around the code are valid, and say the same as the project's own settings."""

import re

import pytest
import yaml
from pages import ROOT

PROJECT = (ROOT / "pyproject.toml").read_text()
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]


def setting(name):
    return re.search(rf'^{name} = "(.*)"$', PROJECT, re.M)[1]


def test_the_citation_is_that_of_this_version():
    assert {"cff-version", "message", "title", "authors"} <= set(CITATION)  # what the format requires
    assert CITATION["version"] == setting("version")
    assert CITATION["license"] == setting("license")
    assert CITATION["title"].startswith(f"{setting('name')}: ")
    paper = CITATION["preferred-citation"]
    assert {"type", "title", "authors"} <= set(paper)
    assert paper["url"] == setting("Paper")


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_for_issues_has_what_the_host_requires(path):
    form = yaml.safe_load(path.read_text())
    assert all(form[key] for key in ("name", "description", "body"))
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields) > 0
    assert all(field["attributes"]["label"] for field in fields)


def test_the_workflow_runs_what_ci_runs_from_the_oldest_python_on():
    job = WORKFLOW["jobs"]["tests"]
    assert job["strategy"]["matrix"]["python"][0] == setting("requires-python").removeprefix(">=")
    assert job["steps"][-1]["run"] == ".ci/run"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert WORKFLOW["jobs"]["docs"]["steps"][-1]["run"] == "make docs"


def test_the_hooks_are_the_tools_of_make_check():
    check = re.search(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)[1]
    tools = [line.strip().removeprefix("$(BIN)/").partition(" --cov")[0] for line in check.splitlines()]
    assert [hook["entry"].removeprefix(".venv/bin/") for hook in HOOKS] == tools
    assert all(hook["language"] == "system" for hook in HOOKS)
