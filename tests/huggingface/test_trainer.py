"""The callback for the Trainer of transformers, with the real Trainer on tiny models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_text import FAMILIES, SIZE
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from geolora_pl import GeoLoRATrainerCallback, GeoLoRAWarning, RiemannianAdam, inject_adapters, save_adapter
from geolora_pl.adapters.inject import find_adapters


def made(adapted=True):
    """A tiny decoder with dropout, so that a run that is resumed must have the random numbers, too."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **FAMILIES["gpt2"]))
    if adapted:
        inject_adapters(model)
    return model


def texts(count=48):
    ids = torch.randint(5, SIZE, (count, 8), generator=torch.Generator().manual_seed(2))
    ids[:, 1::2] = ids[:, ::2]  # something to learn: every word comes twice
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer_for(folder, model, callback, optimizers=(None, None), more=(), **settings):
    arguments = {
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "weight_decay": 0.1,
        "save_steps": 5,
        "logging_steps": 3,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **settings,
    }
    return Trainer(
        model,
        TrainingArguments(str(folder), **arguments),
        train_dataset=texts(),
        eval_dataset=texts(8),
        callbacks=[callback, *more],
        optimizers=optimizers,
    )


def test_a_run_adapts_and_ends_retracted(tmp_path):
    model, callback = made(), GeoLoRATrainerCallback(tau=0.2, adapt_every=5)
    trainer = trainer_for(tmp_path, model, callback)
    began = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < began
    assert callback.integrator.total_steps == 12
    assert not callback.integrator.unfinished
    assert all(not layer.K[:, layer.probes :].any() and not layer.L.any() for layer in find_adapters(model).values())
    logged = [entry["geolora/mean_rank"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4
    # The last checkpoint has the final ranks, and not what was pending before them.
    last = made()
    last.load_state_dict(load_file(tmp_path / "checkpoint-12" / "model.safetensors"), strict=False)
    assert [a.rank for a in find_adapters(last).values()] == list(callback.integrator.ranks().values())
    with pytest.warns(GeoLoRAWarning, match="from_pretrained does not know"):
        trainer.save_model(tmp_path / "saved")
    save_adapter(model, tmp_path / "adapter.safetensors")


@pytest.mark.parametrize("riemannian", [False, True])
@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2, "save_steps": 4}])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, riemannian, settings):
    """The checkpoint is between two retractions, with steps pending, weight decay and dropout."""

    def run(folder, **how):
        model = made()
        optimizers = (RiemannianAdam(model, lr=0.1, weight_decay=0.1), None) if riemannian else (None, None)
        callback = GeoLoRATrainerCallback(tau=0.2, **how.pop("callback", {}))
        trainer = trainer_for(folder, model, callback, optimizers, **settings)
        trainer.train(**how)
        return model, callback.integrator, trainer

    whole, integrator, _ = run(tmp_path / "a", callback={"adapt_every": 3})
    saved = settings.get("save_steps", 5)
    # The cadence is that of the checkpoint.
    resumed, other, trainer = run(tmp_path / "b", resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{saved}"))
    assert trainer.state.global_step == 12
    assert other.state_dict() == integrator.state_dict()
    assert other.total_steps == 12
    assert other.adapt_every == 3
    for (name, ours), theirs in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_accumulated_batches_are_one_step(tmp_path):
    callback = GeoLoRATrainerCallback(adapt_every=2)
    trainer_for(tmp_path, made(), callback, max_steps=4, gradient_accumulation_steps=3, save_strategy="no").train()
    assert callback.integrator.total_steps == 4


def test_callbacks_that_the_trainer_makes_anew_resume_too(tmp_path):
    """With restore_callback_states_from_checkpoint the Trainer replaces the callback by one of the same settings."""
    first = GeoLoRATrainerCallback(tau=0.2, adapt_every=3)
    trainer_for(tmp_path, made(), first).train()
    trainer = trainer_for(
        tmp_path, made(), GeoLoRATrainerCallback(tau=0.2), restore_callback_states_from_checkpoint=True
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    made_anew = next(c for c in trainer.callback_handler.callbacks if isinstance(c, GeoLoRATrainerCallback))
    assert made_anew.integrator.state_dict() == first.integrator.state_dict()


def test_the_best_model_is_retracted_with_its_own_counters(tmp_path):
    """The best checkpoint was saved between two retractions; the model that is left must not have steps pending."""
    model, callback = made(), GeoLoRATrainerCallback(adapt_every=6)
    trainer = trainer_for(
        tmp_path,
        model,
        callback,
        learning_rate=0.05,
        max_grad_norm=0,
        eval_strategy="steps",
        eval_steps=5,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the best is never the last
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-12"
    pending = load_file(best / "model.safetensors")
    assert any(value.any() for name, value in pending.items() if name.endswith(".L"))
    counters = json.loads((best / "trainer_state.json").read_text())["stateful_callbacks"]["GeoLoRATrainerCallback"]
    assert callback.integrator.total_steps == counters["run"]["integrator"]["total_steps"]
    assert all(not layer.L.any() for layer in find_adapters(model).values())


def test_ranks_stop_to_change(tmp_path):
    callback = GeoLoRATrainerCallback(tau=0.2, adapt_every=2, adapt_until=0.5)
    trainer = trainer_for(tmp_path, made(), callback, logging_steps=1, save_strategy="no")
    trainer.train()
    ranks = [entry["geolora/adapter_params"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(set(ranks[6:])) == 1


def test_training_that_stops_early_ends_retracted(tmp_path):
    callback = GeoLoRATrainerCallback(adapt_every=4)
    trainer = trainer_for(
        tmp_path,
        made(),
        callback,
        more=[EarlyStoppingCallback(1, early_stopping_threshold=100.0)],
        eval_strategy="steps",
        eval_steps=5,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    trainer.train()
    assert trainer.state.global_step == 10
    assert not callback.integrator.unfinished


def test_what_cannot_work_is_refused_before_the_first_step(tmp_path):
    plain = made(adapted=False)
    with pytest.raises(ValueError, match="the model has no adapters: inject_adapters"):
        trainer_for(tmp_path, plain, GeoLoRATrainerCallback()).train()
    model = made()
    of_others = torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="does not hold the factors of the adapter transformer"):
        trainer_for(tmp_path, model, GeoLoRATrainerCallback(), (of_others, None)).train()
    with pytest.raises(ValueError, match="adapt_every=50 is longer than the run of 12"):
        trainer_for(tmp_path, made(), GeoLoRATrainerCallback(adapt_every=50)).train()
    with pytest.raises(ValueError, match="adapt_until=2 must lie in"):
        GeoLoRATrainerCallback(adapt_until=2)
    with pytest.raises(RuntimeError, match="follows a training only"):
        GeoLoRATrainerCallback().on_step_end(None, TrainerState(global_step=5, max_steps=5), None)


def test_a_checkpoint_without_the_callback_or_with_another_optimizer_is_refused(tmp_path):
    without = trainer_for(tmp_path, made(), TrainerCallback())
    with pytest.warns(GeoLoRAWarning):
        without.train()
    checkpoint = str(tmp_path / "checkpoint-5")
    with pytest.raises(ValueError, match="step 5 of the checkpoint was not made with one GeoLoRATrainerCallback"):
        trainer_for(tmp_path, made(), GeoLoRATrainerCallback()).train(resume_from_checkpoint=checkpoint)
    trainer_for(tmp_path, made(), GeoLoRATrainerCallback(adapt_every=3)).train()
    model = made()
    groups = [{"params": [p for p in model.parameters() if p.requires_grad]}, {"params": []}]
    trainer = trainer_for(tmp_path, model, GeoLoRATrainerCallback(), (torch.optim.Adam(groups), None))
    with pytest.raises(ValueError, match="made with the optimizer AdamW and this run has Adam,"):
        trainer.train(resume_from_checkpoint=checkpoint)


def mixture():
    """A tiny Mixtral: its experts are stacked in parameters of three dimensions, which are no layers."""
    sizes = {"num_hidden_layers": 2, "num_local_experts": 4, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = AutoConfig.for_model("mixtral", vocab_size=SIZE, hidden_size=16, intermediate_size=8, **sizes)
    return AutoModelForCausalLM.from_config(config)


SAID = (
    "model.layers.0.mlp.experts.gate_up_proj and 3 more like it: experts in stacked weights have no adapters and stay "
)
SAID += f"frozen ({2 * 4 * 3 * 16 * 8:,} parameters)"


def test_experts_that_stay_frozen_are_named(tmp_path, caplog):
    model = mixture()
    inject_adapters(model)
    callback = GeoLoRATrainerCallback()
    trainer_for(tmp_path, model, callback, max_steps=2, save_strategy="no").train()
    assert [record.message for record in caplog.records if "experts" in record.message] == [SAID]
    assert len(callback.integrator.adapters) == 8  # those of the attention


@pytest.mark.slow
def test_the_callback_needs_nothing_of_lightning():
    code = "import sys; from geolora_pl import GeoLoRATrainerCallback; sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=200).returncode == 0


class Mine(GeoLoRATrainerCallback):
    """A user's subclass, which the Trainer keeps by its own name."""


def test_a_subclass_is_resumed_and_takes_the_best_model(tmp_path):
    """A user's subclass failed at the end of the training, and could never be resumed."""
    settings = {"eval_strategy": "steps", "eval_steps": 5, "save_steps": 5, "load_best_model_at_end": True}
    trainer_for(tmp_path, made(), Mine(adapt_every=5), **settings).train()
    resumed = Mine(adapt_every=5)
    trainer_for(tmp_path, made(), resumed, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert resumed.integrator.total_steps >= 5


def test_the_ranks_of_one_training_are_not_logged_with_another_model(tmp_path):
    """A user evaluates a fresh model with the callback of an earlier training: its ranks are not those."""
    callback = GeoLoRATrainerCallback(adapt_every=5)
    trainer_for(tmp_path / "a", made(), callback).train()
    other = trainer_for(tmp_path / "b", made(), callback)
    other.evaluate()
    assert not any("geolora/mean_rank" in entry for entry in other.state.log_history)
