"""Every YAML of configs/: parsed by the command line, run for two steps with tiny stand-ins, set as in the paper."""

import contextlib
import copy
import csv
import functools
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_data import write_cifar, write_tiny_imagenet

from geolora_pl.cli import main
from geolora_pl.data import CIFAR10, CIFAR100

ROOT = Path(__file__).parents[1]
OVERLAYS = sorted(ROOT.glob("configs/trainer/*.y*ml"))
EXPERIMENTS = sorted(set(ROOT.glob("configs/**/*.y*ml")) - set(OVERLAYS))
OF_THE_PAPER = [path for path in EXPERIMENTS if path.stem != "quickstart"]

TWO_STEPS = {
    "trainer.max_epochs": 1,
    "trainer.limit_train_batches": 2,
    "trainer.limit_val_batches": 1,
    "trainer.limit_test_batches": 1,
    "trainer.log_every_n_steps": 1,
    "trainer.enable_progress_bar": False,
    "trainer.enable_model_summary": False,
    "geolora.adapt_every": 1,
    "data.init_args.batch_size": 4,
}
SMALL_VIT = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2}

# The paper's settings, by the names of the configuration.
IMAGES = {
    "model.init_args.model_name": "vit_base_patch16_224.orig_in21k_ft_in1k",
    "model.init_args.pretrained": True,
    "model.init_args.optimizer.class_path": "torch.optim.AdamW",
    "model.init_args.optimizer.init_args.lr": 1e-3,
    "model.init_args.head_lr": None,
    "model.init_args.adapter.train_bias": True,
    "data.init_args.batch_size": 256,
    "geolora.tau": 0.15,
    "trainer.max_epochs": 5,
}
SETTINGS = {f"image/{name}": IMAGES for name in ("cifar10", "cifar100", "tiny_imagenet")}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT / "configs").with_suffix("").as_posix()


@functools.cache
def parsed(*paths: Path) -> dict[str, Any]:
    """The configuration as the command line understands the files, with every default."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
        main(["fit", *[f"--config={path}" for path in paths], "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(out.getvalue())


def setting(config: dict[str, Any], name: str) -> Any:
    return functools.reduce(lambda node, key: node[key], name.split("."), config)


def tiny_model(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Settings that put a small model in the place of one from the hub."""
    settings = config["model"]["init_args"]
    if settings["checkpoint_path"]:  # a file of the project
        return {}
    return {
        "model.init_args.pretrained": False,
        "model.init_args.model_args": json.dumps({**settings["model_args"], **SMALL_VIT}),
    }


def tiny_data(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Settings that put a few samples, in the official layout, in the place of the data set."""
    source = config["data"]["class_path"].rpartition(".")[2]
    if source == "Digits":
        return {}
    {
        "CIFAR10": functools.partial(write_cifar, source=CIFAR10),
        "CIFAR100": functools.partial(write_cifar, source=CIFAR100),
        "TinyImageNet": write_tiny_imagenet,
    }[source](folder)
    return {"data.init_args.folder": folder}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_two_steps_of_every_experiment(path, tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)  # of the real files
    config = parsed(path)
    settings = {**TWO_STEPS, **tiny_model(config, tmp_path), **tiny_data(config, tmp_path)}
    files = [f"--config={path.relative_to(ROOT)}", "--config=configs/trainer/cpu.yaml"]
    main(["fit", *files, *[f"--{name}={value}" for name, value in settings.items()]])

    (metrics,) = Path("lightning_logs").rglob("metrics.csv")
    rows = list(csv.DictReader(metrics.open()))
    for name, count in (("train_loss", 2), ("val_loss", 1)):
        values = [float(row[name]) for row in rows if row[name]]
        assert len(values) == count, name
        assert all(math.isfinite(value) and value > 0 for value in values), name
    assert any(row["rank/mean"] for row in rows)
    assert list(metrics.parent.glob("events.out.tfevents.*"))
    assert (metrics.parent / "checkpoints" / "last.ckpt").is_file()


def test_no_two_experiments_share_a_folder():
    folders = [
        {(logger["init_args"]["name"], logger["init_args"]["version"]) for logger in parsed(path)["trainer"]["logger"]}
        for path in EXPERIMENTS
    ]
    assert all(len(of_one) == 1 for of_one in folders)
    assert len(set.union(*folders)) == len(EXPERIMENTS)


@pytest.mark.parametrize("path", OF_THE_PAPER, ids=name_of)
def test_the_settings_are_those_of_the_paper(path):
    config, expected = parsed(path), SETTINGS[name_of(path)]
    assert {name: setting(config, name) for name in expected} == expected


@pytest.mark.parametrize("path", OVERLAYS, ids=name_of)
def test_an_overlay_changes_the_trainer_and_keeps_loggers_and_callbacks(path):
    overlay = yaml.safe_load(path.read_text())
    experiment = ROOT / "configs" / "image" / "cifar10.yaml"
    expected = copy.deepcopy(parsed(experiment))
    expected["trainer"].update(overlay.pop("trainer"))
    assert not overlay
    assert len(expected["trainer"]["logger"]) == 2
    assert parsed(experiment, path) == expected
