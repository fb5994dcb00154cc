"""What the pages show works: Python runs, YAML and commands are understood by the command line."""

import re
import sys
from types import ModuleType

import lightning as L
import pytest
import torch
from pages import QUIET, ROOT, blocks, commands, of_the_command_line, quiet_trainers, understood
from tiny_text import save_tiny_model
from torch.utils.data import DataLoader, TensorDataset

from geolora_pl import GeoLoRACallback
from geolora_pl.tasks import ImageClassification

pytestmark = pytest.mark.usefixtures("one_parser")
PAGES = {page.name: page for page in (ROOT / "docs").glob("*.md")}


def having(language):
    return [pytest.param(page, id=name) for name, page in sorted(PAGES.items()) if blocks(page, language)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with the configurations."""
    monkeypatch.setattr(sys, "argv", ["geolora_pl"])
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def mine(monkeypatch):
    """The module of one's own that docs/extending.md shows, with data beside it."""
    module = ModuleType("mine")
    for snippet in blocks(PAGES["extending.md"], "python"):
        exec(compile(snippet, "docs/extending.md", "exec"), module.__dict__)

    class ReadingsData(L.LightningDataModule):
        def __init__(self, batch_size: int = 32) -> None:
            super().__init__()
            x = torch.randn(128, 20)
            self.data = TensorDataset(x, x[:, :3].argmax(1))
            self.batch_size = batch_size

        def train_dataloader(self):
            return DataLoader(self.data, self.batch_size)

        def val_dataloader(self):
            return DataLoader(self.data, self.batch_size)

    module.ReadingsData = ReadingsData
    for value in vars(module).values():
        if isinstance(value, type) and value.__module__ == __name__:
            value.__module__ = "mine"
    monkeypatch.setitem(sys.modules, "mine", module)
    return module


@pytest.mark.parametrize("page", having("python"))
def test_python_runs(page, here, hub, monkeypatch):
    quiet_trainers(monkeypatch)
    names = {"__name__": "page"}
    for snippet in blocks(page, "python"):
        exec(compile(snippet, page.name, "exec"), names)


@pytest.mark.parametrize("page", having("yaml"))
def test_yaml_is_understood(page, here, mine, capfd):
    for number, block in enumerate(blocks(page, "yaml")):
        (here / f"{number}.yaml").write_text(block)
        whole = re.search(r"^model:\n +class_path:", block, re.M)
        base = [] if whole else ["--config=configs/quickstart.yaml"]  # an overlay, or settings in passing
        understood(["fit", *base, f"--config={number}.yaml"], capfd)


@pytest.mark.parametrize("page", having("bash"))
def test_commands_are_understood(page, here, mine, capfd):
    makefile = (ROOT / "Makefile").read_text()
    for block in blocks(page, "yaml"):
        if named := re.match(r"# (\w+\.yaml)\b", block):  # in its first line, for the commands
            (here / named[1]).write_text(block)
    for program, *arguments in commands(page, here):
        if program == "make":
            assert all(re.search(rf"^{target}:", makefile, re.M) for target in arguments)
        if given := of_the_command_line(program, arguments):
            understood(given, capfd)


def test_the_classes_of_the_page_on_extending_train(here, mine):
    def fit(module, data):
        trainer = L.Trainer(max_epochs=1, accelerator="cpu", callbacks=GeoLoRACallback(), **QUIET)
        trainer.fit(module, datamodule=data)
        assert all(value.isfinite() for value in trainer.callback_metrics.values())
        return set(trainer.callback_metrics)

    assert "val_accuracy" in fit(mine.Readings(width=16), mine.ReadingsData())
    small = {"img_size": 28, "patch_size": 14, "embed_dim": 24, "depth": 1, "num_heads": 2}
    images = ImageClassification("vit_tiny_patch16_224", pretrained=False, model_args=small)
    assert "val_accuracy" in fit(images, mine.Noise(num_workers=0))
    texts = mine.Reviews(max_length=8, batch_size=8, cache_dir=str(here / "cache"), num_workers=0)
    logged = fit(mine.Calibrated(save_tiny_model(here / "model")), texts)
    assert {"val_accuracy", "val_calibration"} <= logged
