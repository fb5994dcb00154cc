"""A run that was made before the package lay in folders, by the commands and files of that time, is still one."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from geolora_pl.cli.dispatch import main
from geolora_pl.tasks import ImageClassification

RUN = Path(__file__).parent / "run_before_folders"


@pytest.fixture
def run(tmp_path, monkeypatch):
    shutil.copytree(RUN, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def losses(metrics):
    rows = csv.DictReader(metrics.read_text().splitlines())
    return {int(row["step"]): float(row["train_loss"]) for row in rows if row["train_loss"]}


def test_it_resumes_where_it_was(run):
    main(["fit", "--config=run/config.yaml", "--ckpt_path=run/checkpoints/middle.ckpt", "--trainer.logger.name=again"])
    first, again = losses(run / "metrics.csv"), losses(Path("again/metrics.csv"))
    assert sorted(again) == [7, 8, 9]
    # On another processor than that of the first run the losses agree to rounding, which grows from step to step.
    assert again == pytest.approx({step: first[step] for step in again}, rel=1e-3)


@pytest.mark.parametrize("kind", ["adapter", "peft", "merged"])
def test_its_checkpoint_is_exported(run, kind):
    main(["export", "--ckpt_path=run/checkpoints/middle.ckpt", f"--format={kind}", "--output=out"])
    if kind == "peft":
        assert json.loads(Path("out/adapter_config.json").read_text())["peft_type"] == "LORA"
    else:
        assert Path("out" if kind == "adapter" else "out/model.safetensors").is_file()


def test_its_module_ranks_and_report_are_there(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    module = ImageClassification.load_from_checkpoint(run / "checkpoints" / "middle.ckpt")
    assert module(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    main(["ranks", "--ckpt_path=run/checkpoints/middle.ckpt"])
    assert "model.blocks.0.attn.qkv" in capsys.readouterr().out
    main(["report", "--run=run"])
    assert "val_accuracy" in (run / "report.html").read_text()
