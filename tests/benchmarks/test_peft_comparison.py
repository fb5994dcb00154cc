"""The scripts of PEFT's comparison run this package; here a module stands in their place that calls the same names."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_text import SIZE, save_tiny_decoder
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

from benchmarks.peft_comparison import run as comparison
from geolora_pl import AdapterConfig, RankAdaptiveIntegrator, RiemannianAdam
from geolora_pl.adapters.inject import find_adapters

STEPS = 6
DEFAULTS = {"max_steps": STEPS, "optimizer_type": "AdamW", "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1}}


@dataclass
class TrainConfig:
    """As theirs: it refuses an optimizer that torch does not have."""

    model_id: str
    max_steps: int
    optimizer_type: str
    optimizer_kwargs: dict

    def __post_init__(self):
        assert hasattr(torch.optim, self.optimizer_type)


def scripts_of(model_id, out):
    """A module with the names of theirs, which trains a decoder for some steps and writes a row."""

    def get_model(*, model_id, peft_config, autocast_adapter_dtype):
        assert peft_config is None
        return AutoModelForCausalLM.from_pretrained(model_id)

    def get_optimizer_and_scheduler(model, *, optimizer_type, max_steps, **settings):
        optimizer = getattr(torch.optim, optimizer_type)(model.parameters(), **settings)
        return optimizer, get_cosine_schedule_with_warmup(optimizer, 1, max_steps)

    def main(*, path_experiment, experiment_name, clean, bucket_name):
        config = scripts.PeftConfig.from_pretrained(path_experiment)
        more = json.loads(Path(path_experiment, "training_params.json").read_text())
        settings = TrainConfig(model_id, **{**DEFAULTS, **more})
        model = scripts.get_model(model_id=model_id, peft_config=config, autocast_adapter_dtype=True)
        kwargs = {"optimizer_type": settings.optimizer_type, **settings.optimizer_kwargs}
        optimizer, schedule = scripts.get_optimizer_and_scheduler(model, max_steps=STEPS, **kwargs)
        ids, losses = torch.arange(24).view(2, 12) % SIZE, []
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        scripts.print_verbose("trained")
        scripts.model, scripts.optimizer = model, optimizer
        model.save_pretrained(out)
        info = {"experiment_name": experiment_name, "train_config": asdict(settings), "peft_config": config.to_dict()}
        counts = dict(zip(("trained", "all"), model.get_nb_trainable_parameters(), strict=True))
        (out / "row.json").write_text(json.dumps({"run_info": info, "counts": counts, "losses": losses}))

    scripts = SimpleNamespace(
        get_model=get_model, get_optimizer_and_scheduler=get_optimizer_and_scheduler, main=main, PeftConfig=None
    )
    return scripts


def test_their_scripts_train_a_decoder_by_this_package_and_write_its_row(tmp_path):
    experiment = tmp_path / "experiments" / "geolora" / "tiny"
    experiment.mkdir(parents=True)
    settings = {
        "adapter": {"target_modules": ["q_proj", "v_proj"], "max_rank": 4},
        "integrator": {"tau": 0.1, "adapt_every": 2},
    }
    (experiment / "adapter_config.json").write_text(json.dumps(settings))
    (experiment / "training_params.json").write_text((comparison.EXPERIMENT / "training_params.json").read_text())
    scripts = scripts_of(save_tiny_decoder(tmp_path / "model", "llama"), tmp_path)
    before = dict(vars(scripts))
    comparison.run(scripts, experiment)
    assert {name: vars(scripts)[name] for name in before} == before, "their names mean again what they meant"
    assert not hasattr(torch.optim, "RiemannianAdam")

    row = json.loads((tmp_path / "row.json").read_text())
    assert row["losses"][-1] < row["losses"][0]
    info = row["run_info"]
    assert info["experiment_name"] == "geolora/tiny"
    assert info["train_config"]["optimizer_type"] == "RiemannianAdam"
    assert isinstance(scripts.optimizer, RiemannianAdam)
    adapters = find_adapters(scripts.model)
    found = info["peft_config"].pop("found")
    assert info["peft_config"] == {"peft_type": "GEOLORA", **settings}
    assert found["ranks"] == {name: layer.rank for name, layer in adapters.items()}
    assert len(adapters) == 4
    assert all(torch.count_nonzero(layer.L) == 0 for layer in adapters.values()), "nothing is pending at the end"
    columns = 4 + AdapterConfig().probes
    widths = [layer.in_features + layer.out_features for layer in adapters.values()]
    assert row["counts"]["trained"] == columns * sum(widths)
    assert found["parameters"] == sum(w * layer.rank for w, layer in zip(widths, adapters.values(), strict=True))
    assert not any("gate_proj" in name for name in load_file(tmp_path / comparison.WEIGHTS)), "adapters alone are saved"


def test_the_experiment_of_this_folder_has_settings_that_there_are():
    settings = json.loads((comparison.EXPERIMENT / "adapter_config.json").read_text())
    adapter = AdapterConfig(**settings["adapter"])
    linear = torch.nn.ModuleDict({name: torch.nn.Linear(8, 8) for name in adapter.target_modules})
    comparison.inject_adapters(linear, adapter)
    RankAdaptiveIntegrator(linear, **settings["integrator"])
    training = json.loads((comparison.EXPERIMENT / "training_params.json").read_text())
    RiemannianAdam(linear, **training["optimizer_kwargs"])


def test_a_folder_without_the_scripts_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        comparison.main([str(tmp_path)])
    assert "run.py is not there" in capsys.readouterr().err
