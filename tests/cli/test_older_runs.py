"""A run that was made before the package lay in folders and adapters had probes, by the files of that time, is one."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from geolora_pl.cli.dispatch import main
from geolora_pl.tasks import ImageClassification

pytestmark = pytest.mark.usefixtures("one_parser")
QUIET = ["--trainer.logger=false", "--trainer.enable_progress_bar=false"]
RUN = Path(__file__).parent / "run_before_folders"


@pytest.fixture
def run(tmp_path, monkeypatch):
    shutil.copytree(RUN, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("  grow: false\n", ""))  # a setting that is gone
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def losses(metrics):
    rows = csv.DictReader(metrics.read_text().splitlines())
    return {int(row["step"]): float(row["train_loss"]) for row in rows if row["train_loss"]}


FIT = ["fit", "--config=run/config.yaml", "--ckpt_path=run/checkpoints/middle.ckpt", "--trainer.logger.name=again"]


def test_it_does_not_go_on_with_probes(run):
    with pytest.raises(ValueError, match=r"the checkpoint has 0 probes per adapter and this model has 2, .*probes=0 "):
        main(FIT)


def test_it_resumes_where_it_was(run):
    main([*FIT, "--model.init_args.adapter.probes=0"])
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
    assert "attn.qkv" in capsys.readouterr().out
    main(["validate", "--config=run/config.yaml", "--ckpt_path=run/checkpoints/middle.ckpt", *QUIET])
    assert "val_accuracy" in capsys.readouterr().out
    main(["report", "--run=run"])
    page = (run / "report.html").read_text()
    assert "val_accuracy" in page
    assert "<dt>mean rank</dt>" in page
    assert "rank/mean" not in page
