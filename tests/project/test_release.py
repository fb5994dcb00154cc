"""What is published: its contents, its description, and that it serves in an empty environment and an empty folder."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from pages import ROOT

import geolora_pl

pytestmark = pytest.mark.slow
KINDS = {".py", ".pyi", ".typed", ".css", ".yaml", ".safetensors"}
SHORT = ["max_epochs=1", "limit_train_batches=2", "limit_val_batches=1", "limit_test_batches=1", "accelerator=cpu"]


def run(*command, **settings):
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=clean, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A source archive, and the wheel made of it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def of_the_package():
    files = (path for path in (ROOT / "geolora_pl").rglob("*") if path.suffix in KINDS)
    return {path.relative_to(ROOT).as_posix() for path in files}


def test_the_archives_hold_the_package_and_nothing_else(built):
    sdist, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == of_the_package()
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    around = {name for name in names if not name.startswith(("geolora_pl/", "geolora_pl.egg-info/"))}
    assert {name for name in names if name.startswith("geolora_pl/")} == of_the_package()
    written = {
        "CHANGELOG.md",
        "CITATION.cff",
        "LICENSE",
        "MANIFEST.in",
        "README.md",
        "constraints.txt",
        "pyproject.toml",
    }
    assert around == written | {"PKG-INFO", "setup.cfg"}


def test_the_description_is_one_that_the_index_shows(built):
    assert run(sys.executable, "-m", "twine", "check", "--strict", *built).count("PASSED") == 2


def test_the_wheel_serves_in_an_empty_environment_away_from_the_repository(built, tmp_path):
    """A user installed the wheel and had neither a command, nor the quickstart, nor a configuration to start from."""
    environment, folder = tmp_path / "environment", tmp_path / "folder"
    folder.mkdir()
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python, script = environment / "bin" / "python", environment / "bin" / "geolora-pl"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", built[1])
    # The libraries come from the environment of this test, after what was installed.
    home = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (home / "libraries.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")

    where = run(python, "-c", "import geolora_pl; print(geolora_pl.__file__)", cwd=folder)
    assert Path(where.strip()).is_relative_to(environment)
    assert run(script, "--version", cwd=folder).strip() == f"geolora_pl {geolora_pl.__version__}"
    assert run(script, "init", "image", cwd=folder).startswith("image.yaml is written")
    assert "test_accuracy: " in run(script, "quickstart", *(f"--trainer.{each}" for each in SHORT), cwd=folder)
    assert {path.name for path in folder.iterdir()} == {"image.yaml", "lightning_logs"}
