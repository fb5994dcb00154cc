"""Lightning's own tools work with adapters as with any module; docs/recipes.md says so of each of them."""

import lightning as L
import pytest
import torch
from foreign import loader, trainer
from lightning.pytorch.callbacks import BatchSizeFinder, EarlyStopping, ModelCheckpoint
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from small import Small
from tolerance import NETWORK, close

from geolora_pl import GeoLoRACallback, merge_adapters


class Data(L.LightningDataModule):
    def __init__(self, batch_size=2):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return loader(self.batch_size, batches=48 // self.batch_size)

    val_dataloader = train_dataloader


def fitted(*callbacks, **settings):
    module, callback = Small(), GeoLoRACallback()
    of_fit = trainer(callback, *callbacks, **settings)
    of_fit.fit(module, Data())
    return module, callback, of_fit


def test_early_stopping_ends_a_run_after_its_last_retraction():
    _, callback, of_fit = fitted(EarlyStopping("val_loss", patience=1, min_delta=100.0), max_epochs=50)
    assert of_fit.current_epoch == 2
    assert callback.integrator.adaptations > 0
    assert not callback.integrator.unfinished


def test_the_best_checkpoints_are_kept_by_a_score(tmp_path):
    kept = ModelCheckpoint(tmp_path, "{epoch}", monitor="val_loss", save_top_k=2)
    fitted(kept, max_epochs=4)
    assert sorted(kept.best_k_models) == sorted(str(path) for path in tmp_path.iterdir())
    assert len(kept.best_k_models) == 2
    best = Small.load_from_checkpoint(kept.best_model_path)
    (validated,) = trainer(GeoLoRACallback()).validate(best, Data(), verbose=False)
    assert validated["val_loss"] == pytest.approx(kept.best_model_score.item(), rel=1e-4)


def test_the_batch_size_finder_leaves_the_adapters_as_they_were(tmp_path):
    module, callback, data = Small(), GeoLoRACallback(), Data()
    finder = BatchSizeFinder(steps_per_trial=2, max_trials=2)
    trainer(callback, finder, default_root_dir=tmp_path).fit(module, data)
    assert data.batch_size == finder.optimal_batch_size == 4
    assert callback.integrator.total_steps == 48 / 4
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("make", [SimpleProfiler, AdvancedProfiler, PyTorchProfiler])
def test_a_profiler_sees_the_steps(make, tmp_path):
    fitted(profiler=make(dirpath=tmp_path, filename="steps"), max_steps=6)
    assert any("optimizer_step" in path.read_text() for path in tmp_path.iterdir())


@pytest.mark.parametrize("settings", [{"overfit_batches": 2, "max_epochs": 3}, {"fast_dev_run": 3}])
def test_a_short_trial_of_a_run_adapts_as_well(settings):
    _, callback, of_fit = fitted(**settings)
    assert of_fit.global_step == settings.get("fast_dev_run", 6)
    assert callback.integrator.adaptations > 0


@pytest.mark.parametrize("merged", [False, True])
def test_torch_export_takes_the_adapters(merged):
    module, _, _ = fitted(max_steps=3)
    model, x = module.model.eval(), next(iter(loader()))[0]
    expected = model(x)
    if merged:
        merge_adapters(model)
    close(torch.export.export(model, (x,)).module()(x), expected, NETWORK)
