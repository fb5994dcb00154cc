import json

import pytest
import yaml
from foreign import ADAPTER, Foreign, loader, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from geolora_pl import GeoLoRACallback
from geolora_pl.loggers import CSVLogger
from geolora_pl.report.identity import identity
from geolora_pl.report.record import read_record
from geolora_pl.report.runs import read_run


def fit(folder, logger=CSVLogger, epochs=1, ckpt_path=None):
    callback = GeoLoRACallback(tau=0.05, adapter=ADAPTER)
    checkpoint = ModelCheckpoint(folder / "checkpoints", save_last=True, monitor="val_loss")
    made = logger(folder, name="", version="")
    runs = trainer(callback, checkpoint, logger=made, max_epochs=epochs, log_every_n_steps=6)
    runs.fit(Foreign(), loader(), loader(), ckpt_path=ckpt_path)
    return callback.integrator


@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger])
def test_a_run_from_python_says_what_it_was(tmp_path, monkeypatch, logger):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    integrator = fit(tmp_path, logger)
    record = read_record(tmp_path)
    assert (record["first_step"], record["last_step"]) == (0, 6)
    assert record["better.val_loss"] == "min"
    base = sum(p.numel() for p in Foreign().body.parameters())
    assert (record["base"], record["in_full"]) == (base, 18)
    said = identity(read_run(tmp_path))
    assert said[0] == "Foreign on TensorDataset"
    assert said[2:5] == ["seed 7", "AdamW, lr 0.01", "tau 0.05"]
    assert said[5].endswith("steps per second")
    size = integrator.adapter_parameters()
    assert said[6] == f"adapters {size / base:.1%} of the base, as a LoRA of rank {size / (22 + 20):.1f}"
    assert said[7] == "cpu"
    assert said[8].startswith("geolora_pl 0.")
    assert ", torch 2." in said[8]


def test_a_new_run_in_a_folder_has_nothing_of_the_one_before(tmp_path):
    (tmp_path / "confusion.csv").write_text("step 1,a\na,1\n")
    fit(tmp_path)
    assert read_run(tmp_path).confusion is None


def test_a_resumed_run_says_from_where_on(tmp_path):
    fit(tmp_path)
    fit(tmp_path, epochs=2, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert any(", from step 6 on, " in part for part in identity(read_run(tmp_path)))


def test_a_run_that_breaks_off_says_how_far_it_came(tmp_path):
    class Breaks(Foreign):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise KeyError("out")
            return super().training_step(batch, batch_idx)

    callback = GeoLoRACallback(adapter=ADAPTER)
    runs = trainer(callback, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=6)
    with pytest.raises(KeyError):
        runs.fit(Breaks(), loader())
    assert read_record(tmp_path)["last_step"] == 3


def test_a_run_of_the_command_line_without_a_record_is_known_by_its_configuration(tmp_path):
    optimizer = {"class_path": "geolora_pl.RiemannianAdam", "init_args": {"lr": 0.3}}
    settings = {
        "seed_everything": 0,
        "model": {
            "class_path": "geolora_pl.tasks.Image",
            "init_args": {"model_name": "vit.dino", "optimizer": optimizer},
        },
        "data": {"class_path": "geolora_pl.data.Digits"},
        "geolora": {"tau": 0.2, "budget": 5000},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "metrics.csv").write_text("step,val_loss\n0,1\n")
    expected = ["vit.dino on Digits", "seed 0", "RiemannianAdam, lr 0.3", "tau 0.2, budget 5,000"]
    assert identity(read_run(tmp_path)) == expected


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 90_000, '{"model": ["a"], "seconds": {}, "tau": null}'])
def test_a_broken_record_costs_the_line_alone(tmp_path, text):
    (tmp_path / "metrics.csv").write_text("step,val_loss\n0,1\n")
    (tmp_path / "run.json").write_text(text)
    assert identity(read_run(tmp_path)) == []


def test_numbers_without_sense_are_no_error(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,geolora/adapter_params\n0,100\n")
    odd = {"seconds": 1e-300, "first_step": -1e300, "last_step": 10**400, "base": 0, "per_rank": -1, "started": "soon"}
    (tmp_path / "run.json").write_text(json.dumps({**odd, "tau": float("nan"), "lr": float("inf")}))
    assert all(isinstance(part, str) for part in identity(read_run(tmp_path)))
