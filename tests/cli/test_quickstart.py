"""What `make fit` promises, in full."""

import csv
from pathlib import Path

import pytest

from geolora_pl.cli.dispatch import main

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_quickstart_reaches_its_score_below_the_cap(tmp_path, monkeypatch, capfd):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", "configs/quickstart.yaml", "--trainer.enable_progress_bar=false"])
    rows = list(csv.DictReader((tmp_path / "lightning_logs/quickstart/metrics.csv").read_text().splitlines()))
    last = {name: float(value) for row in rows for name, value in row.items() if value}
    assert last["test_accuracy"] >= 0.96
    assert last["geolora/adapter_params"] < 32_768  # LoRA at r 8
    assert max(value for name, value in last.items() if name.startswith("rank/")) < 16
    assert "tensorboard --logdir lightning_logs/quickstart" in capfd.readouterr().out
