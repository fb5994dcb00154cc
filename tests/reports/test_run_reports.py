"""What users have reported of runs, files and the command line, each as it must be."""

import contextlib
import copy
import enum
import json
import os
import pickle
import re
import threading
import types
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from flags import QUIET
from foreign import ADAPTER, Endless, Foreign, loader, trainer
from lightning.pytorch.callbacks import (
    Checkpoint,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
)
from lightning.pytorch.tuner import Tuner
from peft import AutoPeftModelForSequenceClassification
from recorded import BATCHES, Noisy, Recorded
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import Small
from tolerance import NETWORK, close
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from transformers import BertConfig, BertForSequenceClassification

from geolora_pl import (
    AdapterConfig,
    GeoLoRACallback,
    GeoLoRAWarning,
    MergedAdapters,
    PredictionWriter,
    export_peft,
    import_peft,
    inject_adapters,
    load_adapter,
    merge_adapters,
    save_adapter,
)
from geolora_pl.adapters.inject import find_adapters, has_adapters
from geolora_pl.cli.dispatch import main
from geolora_pl.data import Digits
from geolora_pl.lightning.checkpoint_io import WholeFiles
from geolora_pl.lightning.loading import _configured, build_module
from geolora_pl.loggers import CSVLogger
from geolora_pl.report.drawn import drawn_pictures, folder_of_step
from geolora_pl.report.write import write_report
from geolora_pl.storage.adapter_file import _checksum, read_adapter
from geolora_pl.storage.atomic import atomic
from geolora_pl.storage.checkpoint import read_checkpoint
from geolora_pl.storage.fingerprint import base_parameters
from geolora_pl.storage.plain_file import write_weights

BERT = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
DIGITS = {"input_size": (1, 28, 28), "mean": (0.5,), "std": (0.5,), "interpolation": "bicubic", "crop_pct": 1.0}


def adapted():
    model = nn.Sequential(nn.Linear(8, 8))
    inject_adapters(model)
    return model


# Files: what is written replaces nothing but what it stands for


def test_two_runs_in_one_folder_do_not_break_each_others_checkpoint(tmp_path):
    """Two runs saved last.ckpt into one folder at the same time. Neither fails, and the file is one of theirs."""
    files, errors = WholeFiles(nn.Linear(1, 1)), []

    def save(value):
        try:
            for _ in range(20):
                files.save_checkpoint({"a": torch.full((2000,), value)}, tmp_path / "last.ckpt")
        except OSError as error:
            errors.append(error)

    runs = [threading.Thread(target=save, args=(float(value),)) for value in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert not errors
    assert len(torch.load(tmp_path / "last.ckpt", weights_only=True)["a"].unique()) == 1
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_a_planted_link_is_not_followed(tmp_path):
    """Somebody put a link under the temporary name of a checkpoint. What it leads to stays as it is."""
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".last.ckpt.part").symlink_to(tmp_path / "precious")
    WholeFiles(nn.Linear(1, 1)).save_checkpoint({"a": 1}, tmp_path / "last.ckpt")
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_link_at_the_target_stays_a_link(tmp_path):
    """A user's output was a link to another disk. The file it leads to is written, and the link is kept."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    with atomic(tmp_path / "out") as unfinished:
        unfinished.write_text("whole")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "out").read_text() == "whole"


def test_overwriting_an_export_deletes_nothing_else(tmp_path):
    """A user gave overwrite=True and a folder of other files. It is refused, and an earlier export is replaced."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds thesis\.tex, which is no part of what is written .* another folder"):
        export_peft(adapted(), tmp_path / "docs", overwrite=True)
    assert os.listdir(tmp_path) == ["docs"]
    assert (tmp_path / "docs" / "thesis.tex").read_text() == "years of work"
    for _ in range(2):
        export_peft(adapted(), tmp_path / "lora", overwrite=True)


def test_the_folder_in_which_one_works_is_not_replaced(tmp_path, monkeypatch):
    """A user exported to ../work from within work. The folder was left hidden; now it is refused and stays."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(ValueError, match="is the folder in which you work"):
        export_peft(adapted(), "../work", overwrite=True)
    assert os.listdir(tmp_path) == ["work"]


@pytest.mark.parametrize("name", ["before", "usual", "new"])
def test_a_folder_of_any_name_is_written_and_replaced(tmp_path, name):
    """A user exported twice into a folder called before, and was told that a directory is not empty."""
    for _ in range(2):
        export_peft(adapted(), tmp_path / name, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert not (tmp_path / name / "adapter_model.safetensors").stat().st_mode & 0o111


def test_exported_weights_may_be_read_by_whoever_may_read_other_files(tmp_path):
    """A user exported for a server of another account, which could read settings, but no weights."""
    (tmp_path / "beside").touch()
    model = adapted()
    save_adapter(model, tmp_path / "adapter.safetensors")
    export_peft(model, tmp_path / "lora")
    merge_adapters(model)
    with atomic(tmp_path / "plain.safetensors") as unfinished:
        write_weights(model, unfinished)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 5
    assert {path.stat().st_mode for path in files} == {(tmp_path / "beside").stat().st_mode}


def test_a_file_is_not_replaced_by_a_folder(tmp_path):
    """A user named a file as the output of an export with overwrite=True. It stays, and the message says so."""
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(ValueError, match="is a file, but a folder must be written"):
        export_peft(adapted(), tmp_path / "notes.txt", overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "notes"


# Resuming: the run goes on as if it had never stopped, or it is said why it does not


class Stops(L.Callback):
    """Saves a checkpoint in the middle of a batch and ends the run, as a signal handler does."""

    def __init__(self, path, at, hook):
        self.path, self.at = path, at
        setattr(self, hook, self.stop)

    def stop(self, trainer, *_):
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.at:
            trainer.save_checkpoint(self.path)
            raise KeyError("stopped")


def losses(module, *callbacks, ckpt_path=None, epochs=2):
    """Fit, from the start or from a checkpoint with other random numbers; the losses by epoch and batch."""
    L.seed_everything(0 if ckpt_path is None else 1, verbose=False)
    saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
    callback = GeoLoRACallback(adapter=ADAPTER, adapt_every=2)
    runs = trainer(callback, *callbacks, max_epochs=epochs, enable_checkpointing=saves)
    with contextlib.suppress(KeyError):
        runs.fit(module, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return module.losses


@pytest.mark.parametrize("at", [0, 3, 5, 6, 9, 11])
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_backward"])
def test_a_batch_in_whose_middle_a_checkpoint_was_saved_comes_again(tmp_path, at, hook):
    """A run was stopped and saved in the middle of a batch. A resumed run begins with that batch, exactly."""
    whole = losses(Recorded(validated=False))
    losses(Recorded(validated=False), Stops(tmp_path / "middle.ckpt", at, hook))
    resumed = losses(Recorded(validated=False), ckpt_path=tmp_path / "middle.ckpt")
    assert resumed == {place: loss for i, (place, loss) in enumerate(whole.items()) if i >= at}


@pytest.mark.filterwarnings("ignore:.*(was called without a model|no last checkpoint available):UserWarning")
def test_an_exception_checkpoint_goes_on_with_the_batch_that_failed(tmp_path):
    """A batch failed and OnExceptionCheckpoint saved. The resumed run begins with that batch, exactly."""
    whole = losses(Recorded(validated=False))

    class Fails(L.Callback):
        def on_before_backward(self, trainer, *_):
            if trainer.global_step == 8:
                raise KeyError

    losses(Recorded(validated=False), Fails(), OnExceptionCheckpoint(tmp_path, "failed"))
    resumed = losses(Recorded(validated=False), ckpt_path=tmp_path / "failed.ckpt")
    assert resumed == {place: loss for i, (place, loss) in enumerate(whole.items()) if i >= 8}


class Drawing(Recorded):
    """Its loader draws the order from a generator of its own."""

    def __init__(self, of):
        super().__init__(validated=False)
        self.of = of

    def train_dataloader(self):
        generator, data = torch.Generator().manual_seed(3), Noisy(8 * BATCHES)
        if self.of == "loader":
            return DataLoader(data, 8, shuffle=True, generator=generator)
        sampler = RandomSampler(data, generator=generator)
        if self.of == "sampler":
            return DataLoader(data, 8, sampler=sampler)
        return DataLoader(data, batch_sampler=BatchSampler(sampler, 8, drop_last=False))


@pytest.mark.parametrize("of", ["loader", "sampler", "batch sampler"])
@pytest.mark.parametrize("step", [4, 6])
def test_a_loader_with_a_generator_of_its_own_goes_on_exactly(tmp_path, of, step):
    """A user shuffled with a generator of his own. A resumed run used to see some samples twice and others never."""
    saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    whole = losses(Drawing(of), saved, epochs=3)
    resumed = losses(Drawing(of), ckpt_path=tmp_path / f"step={step}.ckpt", epochs=3)
    assert resumed == {place: loss for i, (place, loss) in enumerate(whole.items()) if i >= step}


def test_persistent_workers_are_said_to_be_no_exact_resume(tmp_path):
    """A data set drew random numbers in persistent workers. The resume cannot be exact, and one line says so."""

    class Working(Recorded):
        def train_dataloader(self):
            return DataLoader(Noisy(16), 8, num_workers=1, persistent_workers=True)

    saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    losses(Working(validated=False), saved, epochs=1)
    with pytest.warns(GeoLoRAWarning, match=r"persistent_workers=True: .* exact only if the data set draws none"):
        losses(Working(validated=False), ckpt_path=tmp_path / "step=1.ckpt", epochs=1)


class Several(Recorded):
    """Beside its data it takes others, of which there are fewer, so that they come several times in an epoch."""

    def __init__(self, own):
        super().__init__(validated=False)
        self.own = own

    def train_dataloader(self):
        generators = [torch.Generator().manual_seed(seed) if seed in self.own else None for seed in (1, 2)]
        sizes = (8 * BATCHES, 16)
        return [
            DataLoader(Noisy(size), 8, shuffle=True, generator=generator)
            for size, generator in zip(sizes, generators, strict=True)
        ]

    def training_step(self, batch, batch_idx):
        return super().training_step([torch.cat(parts) for parts in zip(*batch, strict=True)], batch_idx)


@pytest.mark.parametrize("own", [{1, 2}, {2}, {1}, set()])
def test_of_several_loaders_one_that_is_begun_again_needs_a_generator_of_its_own(tmp_path, own):
    """A user's second loader was shorter and went round. Resumed, it went on in another order, and nobody said it."""
    saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = losses(Several(own), saved)
    for step in (2, 3):
        said = pytest.warns(GeoLoRAWarning, match=r"a data loader of 2 batches had ended .* a generator of its own")
        with said if step > 2 and 2 not in own else contextlib.nullcontext():
            resumed = losses(Several(own), ckpt_path=tmp_path / f"step={step}.ckpt")
        if 2 in own or step == 2:
            assert resumed == {place: loss for i, (place, loss) in enumerate(whole.items()) if i >= step}


@pytest.mark.parametrize("what", ["reload_dataloaders_every_n_epochs=1", "ReduceLROnPlateau"])
def test_what_lightning_does_otherwise_in_a_resumed_run_is_said(tmp_path, what):
    """A user resumes such runs and compares them with one run: data or learning rates differed, without a word."""

    class Waits(Recorded):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            if what != "ReduceLROnPlateau":
                return optimizer
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "train_loss"}}

    def fit(**resumed):
        reload = int(what != "ReduceLROnPlateau")
        saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4)
        runs = trainer(GeoLoRACallback(adapter=ADAPTER), saved, reload_dataloaders_every_n_epochs=reload)
        runs.fit(Waits(validated=False), **resumed)

    fit()
    with pytest.warns(GeoLoRAWarning, match=f"^{what}: .* for an exact one$"):
        fit(ckpt_path=tmp_path / "step=4.ckpt", weights_only=True)


def test_accumulated_gradients_that_a_checkpoint_does_not_hold_are_said(tmp_path):
    """A user validates and saves every 3 batches and accumulates 2: a resumed run took a step with one of them."""
    settings = {"val_check_interval": 3, "accumulate_grad_batches": 2, "num_sanity_val_steps": 0, "max_epochs": 1}

    def fit(**resumed):
        saved = ModelCheckpoint(tmp_path, "{step}", save_on_train_epoch_end=False, save_top_k=-1)
        trainer(GeoLoRACallback(adapter=ADAPTER), saved, **settings).fit(Validated(), **resumed)

    class Validated(Recorded):
        def val_dataloader(self):
            return loader()

    fit()
    with pytest.warns(GeoLoRAWarning, match="the gradients of 1 accumulated batches are not in it"):
        fit(ckpt_path=tmp_path / "step=1.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("name", "is_told"), [("step=4", True), ("step=6", False), ("step=8", False), ("epoch=0", True)]
)
def test_a_schedule_of_accumulation_that_does_not_hold_in_the_epoch_that_goes_on_is_said(tmp_path, name, is_told):
    """A user resumes in an epoch that accumulates: its other batches were steps of their own, without a word."""
    accumulation = GradientAccumulationScheduler({1: 2})
    steps = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    ends = ModelCheckpoint(tmp_path, "{epoch}", save_on_train_epoch_end=True, save_top_k=-1)
    whole = losses(Recorded(validated=False), steps, ends, accumulation)
    said = pytest.warns(GeoLoRAWarning, match="^GradientAccumulationScheduler: .* 1 batches there and not 2")
    with contextlib.nullcontext() if is_told else said:
        resumed = losses(Recorded(validated=False), accumulation, ckpt_path=tmp_path / f"{name}.ckpt")
    if is_told:
        assert resumed == {place: loss for place, loss in whole.items() if place in resumed}
        assert len(resumed) == len(whole) - (4 if name == "step=4" else BATCHES)


@pytest.mark.parametrize("augment", [None, {"hflip": 0.5}])
def test_augmented_images_have_no_persistent_workers(augment):
    """The package's own images with augmentation and workers were not resumed exactly. Their workers begin afresh."""
    data = Digits(num_workers=1, augment=augment)
    data.trainer = types.SimpleNamespace(lightning_module=types.SimpleNamespace(data_config=DIGITS))
    data.setup("fit")
    assert data.train_dataloader().persistent_workers == (augment is None)
    assert data.val_dataloader().persistent_workers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 4.0}, r"alpha=4\.0 of body\.0 does not fit the checkpoint, which was made with 1\.0: set alpha"),
        ({"modules_to_save": ()}, r"head\.bias is not trained in this run and is in that of the checkpoint"),
        ({"train_bias": True}, r"body\.0\.bias is trained in this run and is not in that of the checkpoint"),
    ],
)
def test_other_adapters_do_not_take_up_a_run_of_a_module_of_your_own(tmp_path, change, message):
    """A module was resumed with another alpha, or with other parameters trained. It is refused before a step."""
    fitted(tmp_path / "a.ckpt")
    runs = trainer(GeoLoRACallback(adapter=replace(ADAPTER, **change)), max_epochs=2)
    with pytest.raises(ValueError, match=message):
        runs.fit(Foreign(), loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert runs.global_step == 0


def test_another_alpha_is_refused_by_a_test_as_well(tmp_path):
    """A checkpoint was tested with another alpha, and the scores were of another function. Now it is refused."""
    fitted(tmp_path / "a.ckpt")
    runs = trainer(GeoLoRACallback(adapter=replace(ADAPTER, alpha=4.0)))
    with pytest.raises(ValueError, match=r"alpha=4\.0 of body\.0 does not fit the checkpoint"):
        runs.test(Foreign(), loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True, verbose=False)


# Runs: what a run needs is there before its first step


def fitted(path, module=None, **settings):
    """A module after a fit, and its checkpoint."""
    module = module or Foreign()
    runs = trainer(GeoLoRACallback(adapter=ADAPTER, **settings))
    runs.fit(module, loader())
    runs.save_checkpoint(path)
    return module


class Validated(Foreign):
    def val_dataloader(self):
        return loader(batches=1)


class Plateau(Validated):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_los"}}


@pytest.mark.parametrize(
    ("module", "callbacks", "owner"),
    [
        (Validated, [ModelCheckpoint(monitor="val_los")], "ModelCheckpoint"),
        (Validated, [EarlyStopping(monitor="val_los")], "EarlyStopping"),
        (Plateau, [], "ReduceLROnPlateau"),
    ],
)
def test_a_metric_that_is_not_logged_is_refused_before_the_first_step(module, callbacks, owner):
    """A user misspelt the metric to wait for, and learnt it after an epoch. Now it is before the first step."""
    runs = trainer(GeoLoRACallback(adapter=ADAPTER), *callbacks)
    with pytest.raises(ValueError, match=f"monitor='val_los' of {owner} is not .*did you mean 'val_loss'"):
        runs.fit(module(), loader())
    assert runs.global_step == 0


@pytest.mark.parametrize("monitor", ["val_loss", "train_loss", "geolora/mean_rank"])
def test_a_metric_that_is_logged_is_waited_for(tmp_path, monitor):
    """Metrics of the validation, of the training and of the ranks are there, and nothing is refused."""
    saved = ModelCheckpoint(tmp_path, monitor=monitor)
    trainer(GeoLoRACallback(adapter=ADAPTER), saved).fit(Validated(), loader())
    assert saved.best_model_path


def test_pruning_is_refused_with_the_remedy():
    """ModelPruning ended in KeyError 'bias'. It is refused, and the remedy is named."""
    runs = trainer(GeoLoRACallback(adapter=ADAPTER), ModelPruning("l1_unstructured", amount=0.5))
    with pytest.raises(ValueError, match=r"ModelPruning puts masked weights .* prune the merged model"):
        runs.fit(Foreign(), loader())


@pytest.mark.parametrize("by", ["callback", "tuner"])
def test_a_learning_rate_that_nothing_reads_is_not_looked_for(by):
    """LearningRateFinder wrote module.lr, which a GeoLoRAModule does not read. It is refused, with what to try."""
    module, callback = Small(), GeoLoRACallback()
    module.lr = 0.1
    fit = trainer(callback, LearningRateFinder()).fit if by == "callback" else Tuner(trainer(callback)).lr_find
    with pytest.raises(ValueError, match=r"LearningRateFinder sets one learning rate .* at 0\.1, 0\.3 and 1"):
        fit(module, loader())


def test_a_module_whose_callback_was_lost_does_not_train():
    """A subclass returned callbacks of its own and lost ours: it trained and its ranks never moved. It is refused."""

    class Lost(Small):
        def configure_callbacks(self):
            return []

    with pytest.raises(ValueError, match=r"the trainer has no GeoLoRACallback.*super\(\)\.configure_callbacks"):
        L.Trainer(**QUIET, logger=False, enable_checkpointing=False, max_epochs=1).fit(Lost(), loader())


class Whole(L.LightningModule):
    """A module of which one with adapters is a part."""

    def __init__(self, lazy=False):
        super().__init__()
        self.part = Small()
        if not lazy:
            self.part.configure_model()

    def configure_model(self):
        self.part.configure_model()

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.part.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad])


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_a_module_with_adapters_inside_of_another_is_adapted(lazy, given):
    """A user makes a GeoLoRAModule a part of a module: it was trained, and no rank ever moved, without a word."""
    module = Whole(lazy)
    callbacks = [GeoLoRACallback(adapt_every=2)] if given else []
    runs = L.Trainer(**QUIET, logger=False, enable_checkpointing=False, max_epochs=1, callbacks=callbacks)
    runs.fit(module, loader())
    (callback,) = (callback for callback in runs.callbacks if isinstance(callback, GeoLoRACallback))
    assert callback.integrator.adaptations > 1
    assert list(callback.integrator.adapters) == ["part.model.0", "part.model.2"]
    runs.validate(Small(), loader())


# Ways out


def test_saving_a_model_of_transformers_with_adapters_warns_of_what_comes_back(tmp_path):
    """A user calls save_pretrained of an adapted model, and from_pretrained makes a random one of the file."""
    model = BertForSequenceClassification(BertConfig(**BERT))
    inject_adapters(model)
    for adapted in (model, copy.deepcopy(model)):
        with pytest.warns(GeoLoRAWarning, match=r"would come back random: merge_adapters\(model\) first"):
            adapted.save_pretrained(tmp_path / "adapted")
    with MergedAdapters(model):
        model.save_pretrained(tmp_path / "for_a_while")
    with pytest.warns(GeoLoRAWarning, match="would come back random"):  # the adapters are back
        model.save_pretrained(tmp_path / "adapted")
    model = pickle.loads(pickle.dumps(model))
    merge_adapters(model)
    assert b"geolora_pl" not in pickle.dumps(model)
    model.save_pretrained(tmp_path / "merged")
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(6)[None]
    close(loaded(ids).logits, model.eval()(ids).logits, NETWORK)


@pytest.mark.parametrize("small", [False, True])
def test_a_module_of_your_own_comes_back_from_its_checkpoint(tmp_path, small):
    """A module got its adapters from the callback, and its load_from_checkpoint knows none. load_adapter loads them."""
    module, plain = fitted(tmp_path / "a.ckpt", small_checkpoints=small), Foreign()
    load_adapter(plain, tmp_path / "a.ckpt")
    for (name, value), (other, expected) in zip(plain.state_dict().items(), module.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(value, expected), name
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert [name for name, parameter in plain.named_parameters() if parameter.requires_grad] == trained


def test_a_checkpoint_of_another_model_is_refused_and_the_model_stays_plain(tmp_path):
    """A checkpoint was loaded into another model. It is refused, and the model stays as it was."""
    fitted(tmp_path / "a.ckpt")
    other = Foreign()
    other.head = nn.Linear(8, 3)
    with pytest.raises(ValueError, match=r"a\.ckpt does not fit the model: head\.bias is not the same in both"):
        load_adapter(other, tmp_path / "a.ckpt")
    assert not has_adapters(other)
    assert all(parameter.requires_grad for parameter in other.parameters())


class Mode(enum.Enum):
    FAST = 1


class Own(Small):
    def __init__(self, folder=None, mode=Mode.FAST, share=0.5, **kwargs):
        super().__init__(**kwargs)
        self.folder, self.mode, self.share = folder, mode, share


def test_paths_and_numpy_numbers_among_hyperparameters_come_back_as_plain_values(tmp_path):
    """A module had a Path and numpy numbers among its arguments. Its checkpoint could not be exported; now it can."""
    module = Own(folder=Path("data"), mode=None, share=np.float32(0.25))
    runs = L.Trainer(**QUIET, logger=False, enable_checkpointing=False, max_epochs=1)
    runs.fit(module, loader())
    runs.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Own.load_from_checkpoint(tmp_path / "a.ckpt")
    assert (loaded.folder, loaded.mode, loaded.share) == ("data", None, 0.25)


def test_what_is_no_plain_value_is_said_to_be_missing_from_checkpoints(tmp_path):
    """A module had an Enum among its arguments. It is said at the start, and a load asks for it."""
    logger = L.pytorch.loggers.CSVLogger(tmp_path, name="run", version="")
    runs = L.Trainer(**QUIET, logger=logger, enable_checkpointing=False, max_epochs=1, log_every_n_steps=1)
    with pytest.warns(GeoLoRAWarning, match=r"mode=<Mode\.FAST: 1> of Own is not a plain value"):
        runs.fit(Own(), loader())
    assert (tmp_path / "run" / "notes.txt").read_text().startswith("mode=<Mode.FAST: 1> of Own is not a plain value")
    runs.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"mode of the checkpoint is not taken from a file: it is <Mode\.FAST: 1>"):
        Own.load_from_checkpoint(tmp_path / "a.ckpt")
    assert Own.load_from_checkpoint(tmp_path / "a.ckpt", mode=Mode.FAST).mode is Mode.FAST


def test_an_export_to_peft_says_what_task_it_is_for(tmp_path):
    """AutoPeftModelForSequenceClassification refused an export, whose task was not named. Now it finds the class."""
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**BERT)).save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    inject_adapters(model, AdapterConfig(modules_to_save=["classifier"]))
    export_peft(model, tmp_path / "lora")
    theirs = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "lora").eval()
    ids = torch.arange(6)[None]
    close(theirs(ids).logits, model.eval()(ids).logits, NETWORK)


def test_the_task_is_not_named_where_peft_would_look_for_a_head_that_was_not_trained(tmp_path):
    """PEFT ends in a KeyError where a task is named and the head is not in the file: its class is named alone."""
    model = BertForSequenceClassification(BertConfig(**BERT))
    inject_adapters(model)
    export_peft(model, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["task_type"] is None
    assert config["auto_mapping"]["base_model_class"] == "BertForSequenceClassification"


# Files from strangers: one sentence, and neither time nor memory without end


class Many(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(count))


def test_a_model_of_many_adapters_is_loaded_in_no_time(tmp_path):
    """load_adapter of 600 adapters took 25 seconds, by one regular expression per layer. There is one per rank."""
    model = Many(600)
    inject_adapters(model, AdapterConfig(init_rank=1, max_rank=2, rank_pattern={"layers.7": 1}))
    plain = Many(600)
    plain.load_state_dict({name.replace(".base.", "."): value for name, value in base_parameters(model).items()})
    save_adapter(model, tmp_path / "a")
    load_adapter(plain, tmp_path / "a")
    assert len(find_adapters(plain)) == 600
    assert len(read_adapter(tmp_path / "a").config.rank_pattern) == 1


@pytest.mark.parametrize("setting", ["target_modules", "rank_pattern", "exclude_modules"])
def test_an_expression_in_an_adapter_file_is_never_run(tmp_path, setting):
    """A file held an expression that takes for ever to match. What is more than names is refused or left aside."""
    plain = nn.ModuleDict({"a" * 40: nn.Linear(8, 8)})
    model = copy.deepcopy(plain)
    inject_adapters(model)
    save_adapter(model, tmp_path / "a")
    with safe_open(tmp_path / "a", "pt") as file:
        metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config = json.loads(metadata["config"])
    config[setting] = {"(a+)+b": 4} if setting == "rank_pattern" else "(a+)+b"
    metadata = {**metadata, "config": json.dumps(config)}
    del metadata["checksum"]
    save_file(tensors, tmp_path / "a", {**metadata, "checksum": _checksum(metadata, tensors)})
    if setting == "exclude_modules":
        load_adapter(plain, tmp_path / "a")
    else:
        with pytest.raises(ValueError, match=r"not a well-formed adapter \('\(a\+\)\+b' does not list names"):
            load_adapter(plain, tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha_pattern": {"0": "x"}}, "has lora_alpha='x'"),
        ({"rank_pattern": [1]}, "has rank_pattern=\\[1\\], which must map names to numbers"),
        ({"rank_pattern": {"(": 2}}, "'\\(' in adapter_config.json is not a regular expression"),
        ({"alpha_pattern": {"(a+)+b": 2}}, "may take for ever to match: write the names"),
        ({"lora_alpha": float("inf")}, "has lora_alpha=inf"),
        ({"r": 0}, "not the two sides of a LoRA of rank 0"),
    ],
)
def test_settings_of_a_lora_that_make_no_sense(tmp_path, change, message):
    """A folder of PEFT held settings of another kind, and the error was Python's. It is one sentence."""
    export_peft(adapted(), tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        import_peft(nn.Sequential(nn.Linear(8, 8)), tmp_path / "lora")


@pytest.mark.parametrize("text", ["[1]", "[" * 100_000, ""])
def test_a_lora_whose_settings_are_not_settings(tmp_path, text):
    """A folder of PEFT held JSON of another kind, or nested without end. It is refused in one sentence."""
    export_peft(adapted(), tmp_path / "lora")
    (tmp_path / "lora" / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"holds no readable adapter_config\.json"):
        import_peft(nn.Sequential(nn.Linear(8, 8)), tmp_path / "lora")


@pytest.mark.parametrize("side", [torch.tensor(1.0), torch.ones(8)])
def test_a_lora_whose_sides_are_not_matrices(tmp_path, side):
    """A folder of PEFT held a number or a vector for B. It is refused in one sentence with the shapes."""
    export_peft(adapted(), tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({name: side if "lora_B" in name else value for name, value in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="which are not the two sides of a LoRA"):
        import_peft(nn.Sequential(nn.Linear(8, 8)), tmp_path / "lora")


def test_a_lora_that_cannot_be_imported_says_why(tmp_path):
    """A .bin file or a LoRA on an embedding was refused by "take another base". The true reason is said."""
    export_peft(adapted(), tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({"base_model.model.0.lora_embedding_A": torch.zeros(2, 8)}, path)
    with pytest.raises(ValueError, match=r"is a LoRA on an embedding.*merge_and_unload"):
        import_peft(nn.Sequential(nn.Embedding(8, 8)), tmp_path / "lora")
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"adapter_model\.bin, whose format may run code.*save_pretrained"):
        import_peft(nn.Sequential(nn.Linear(8, 8)), tmp_path / "lora")


FACTORS = {"U": torch.eye(4)[:, :2], "S": torch.eye(2), "V": torch.eye(4)[:, :2]}
FACTORS |= {"K": torch.zeros(4, 2), "L": torch.zeros(4, 2)}


def checkpoint_of(path, weights, compression=zipfile.ZIP_STORED):
    torch.save({"state_dict": weights, "pytorch-lightning_version": "2.6"}, path)
    if compression != zipfile.ZIP_STORED:
        with zipfile.ZipFile(path) as archive:
            content = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, data in content.items():
                archive.writestr(name, data)
    return str(path)


def said_of(arguments, capsys):
    """What a command says of a mistake."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    "change",
    [
        {"U": torch.tensor(1.0)},
        {"S": torch.zeros(3)},
        {"K": torch.zeros(2, 2)},
        {"V": torch.zeros(3, 9)},
        {"U": "text"},
        {"U": torch.zeros(4, 2, dtype=torch.int)},
        # of some bytes, which ask for a core of 16 GB
        {"U": torch.zeros(1).expand(4, 60_000), "S": torch.zeros(1).expand(60_000, 60_000)},
        {name: torch.zeros(1).expand(factor.shape) for name, factor in FACTORS.items()},
    ],
)
def test_ranks_of_what_is_no_adapter(tmp_path, capsys, change):
    """A checkpoint held other shapes under the names of an adapter. It is one sentence, and no memory is taken."""
    weights = {f"a.{name}": value for name, value in (FACTORS | change).items()}
    said = said_of(["ranks", "--ckpt_path", checkpoint_of(tmp_path / "a.ckpt", weights)], capsys)
    assert "a.ckpt': a has " in said
    assert "is no adapter" in said


def test_ranks_of_values_that_are_not_finite(tmp_path, capsys):
    """A checkpoint held NaN in its factors, and ranks ended in LinAlgError. It says so and names the remedy."""
    weights = {f"a.{name}": value for name, value in (FACTORS | {"S": torch.full((2, 2), torch.nan)}).items()}
    said = said_of(["ranks", "--ckpt_path", checkpoint_of(tmp_path / "a.ckpt", weights)], capsys)
    assert "a holds values that are not finite: go back to a checkpoint before it" in said


def test_an_adapter_that_is_not_finite_is_not_exported(tmp_path):
    """Pending increments held NaN, and an export ended in LinAlgError. It says so and names the remedy."""
    model = adapted()
    model[0].K.data[:] = torch.nan
    for write in (save_adapter, export_peft):
        with pytest.raises(ValueError, match=r"^0 holds values that are not finite"):
            write(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("weights", [[1], {1: 2}])
def test_a_checkpoint_whose_weights_have_no_names(tmp_path, capsys, weights):
    """A checkpoint held a list where weights by name belong. It is refused in one sentence."""
    said = said_of(["ranks", "--ckpt_path", checkpoint_of(tmp_path / "a.ckpt", weights)], capsys)
    assert "has a state_dict that is not weights by name" in said


def test_a_compressed_checkpoint_is_refused(tmp_path):
    """A small file was compressed so that it becomes large in memory. Torch writes none such, and it is refused."""
    path = checkpoint_of(tmp_path / "a.ckpt", {"a": torch.zeros(10_000)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="cannot be read: it is cut short, changed"):
        read_checkpoint(path)


def test_names_from_files_are_no_commands_to_the_terminal(tmp_path, capsys):
    """Names in brackets and control characters ended ranks or reached the terminal. They are shown as they are."""
    weights = {f"[/b]\x1b[31m.{name}": value for name, value in FACTORS.items()}
    (tmp_path / "[red]").mkdir()
    main(["ranks", "--ckpt_path", checkpoint_of(tmp_path / "[red]" / "x[", weights)])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"[/b]\x1b[31m" in out
    assert "[red]/x[" in "".join(out.split("\n"))
    assert r"gone\x1b" in said_of(["ranks", "--ckpt_path", "gone\x1b"], capsys)


def run_folder(path, names=("val_loss",), config=""):
    path.mkdir()
    head = ["step", "geolora/mean_rank", *names]
    lines = [",".join(head), *(",".join(map(str, [step, *range(1, len(head))])) for step in range(3))]
    (path / "metrics.csv").write_text("\n".join(lines) + "\n")
    (path / "config.yaml").write_text(config)
    return path


def test_a_report_shows_names_with_dollars_as_they_are(tmp_path):
    """A metric was called by a formula, and there was no report. Dollars are dollars now."""
    page = write_report(run_folder(tmp_path / "run", ["val_$x_$y^", "rank/a.$q$"])).read_text()
    assert "val_$x_$y^" in page


def test_settings_without_an_end_are_refused(tmp_path):
    """A config.yaml of ten lines stood for a billion settings by aliases. It is refused and costs nothing."""
    levels = [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 11)]
    bomb = "\n".join(["a0: &a0 [x]", *levels])
    with pytest.raises(ValueError, match=r"config\.yaml is not a configuration of a run: it has more than"):
        write_report(run_folder(tmp_path / "run", config=bomb))
    with pytest.raises(ValueError, match=r"config\.yaml is not YAML"):
        write_report(run_folder(tmp_path / "deep", config="[" * 5000))


def test_a_pipe_is_not_waited_for(tmp_path):
    """A pipe lay under the name of a file that is read, and the command waited for ever. It is passed over."""
    run = run_folder(tmp_path / "run")
    (run / "metrics.csv").unlink()
    for name in ("metrics.csv", "events.out.tfevents.1"):
        os.mkfifo(run / name)
    with pytest.raises(ValueError, match=r"holds neither metrics\.csv nor TensorBoard's events"):
        write_report(run)
    export_peft(adapted(), tmp_path / "lora")
    (tmp_path / "lora" / "adapter_config.json").unlink()
    os.mkfifo(tmp_path / "lora" / "adapter_config.json")
    with pytest.raises(ValueError, match=r"adapter_config\.json is not a file"):
        import_peft(nn.Sequential(nn.Linear(8, 8)), tmp_path / "lora")
    drawn = folder_of_step(run, 1)
    drawn.mkdir(parents=True)
    os.mkfifo(drawn / "0.png")
    (drawn / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a cat"}\n')
    assert "a cat" in drawn_pictures(run)
    (drawn / "metadata.jsonl").unlink()
    os.mkfifo(drawn / "metadata.jsonl")
    assert drawn_pictures(run) == ""


# What a resumed run has seen


def mid_epoch(folder, **settings):
    files = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    trainer(GeoLoRACallback(adapter=ADAPTER, adapt_every=2), files).fit(Foreign(), loader(**settings))
    return folder / "step=4.ckpt"


def test_a_run_that_is_resumed_in_mid_epoch_with_other_batches_says_so(tmp_path):
    """A user halved batch_size and went on in mid-epoch: images came again, in silence. A warning says so."""
    ckpt = mid_epoch(tmp_path)
    with pytest.warns(GeoLoRAWarning, match=r"had 6 batches and has 12 now, so that the first 4.*keep batch_size"):
        trainer(GeoLoRACallback(adapter=ADAPTER)).fit(Foreign(), loader(batch_size=4, batches=12), ckpt_path=ckpt)


def test_a_resumed_run_leaves_no_filter_of_warnings_behind(tmp_path):
    """After a resumed run, Lightning's warning was gone from the whole process. The filters are as they were."""
    ckpt, before = mid_epoch(tmp_path), list(warnings.filters)
    trainer(GeoLoRACallback(adapter=ADAPTER)).fit(Foreign(), loader(), ckpt_path=ckpt)
    assert warnings.filters == before


def test_notes_are_those_of_the_last_run_in_the_folder(tmp_path):
    """A user trained again in the same folder, without anything to note, and read the notes of the earlier run."""
    for notes in (["130 images are held out"], []):
        module = Foreign()
        module.notes = notes
        logger = CSVLogger(tmp_path, name="", version="")
        callback = GeoLoRACallback(adapter=ADAPTER, adapt_every=2)
        trainer(callback, logger=logger, log_every_n_steps=1).fit(module, loader())
        assert (tmp_path / "notes.txt").exists() == bool(notes)


class Predicting(Small):
    def predict_step(self, batch):
        raise AssertionError("there is no work before the error")


@pytest.mark.parametrize("data", [Endless(), loader().dataset])
def test_predictions_without_an_order_are_refused_before_the_work(tmp_path, data):
    """A user predicted a stream, and got an error about indices at its end. It is refused before the work."""
    batch_size = 4 if isinstance(data, Endless) else None
    with pytest.raises(ValueError, match=r"whose inputs have no numbers.*give a DataLoader with a batch_size"):
        trainer(PredictionWriter(tmp_path / "p.csv")).predict(Predicting(), DataLoader(data, batch_size=batch_size))


def test_the_ranks_of_a_checkpoint_are_whole_in_a_file(tmp_path, capsys):
    """A user wrote the output of ranks to a file, and the spectra ended in dots. They are whole."""
    model = nn.ModuleDict({"attention_output_dense": nn.Linear(64, 64)})
    inject_adapters(model, AdapterConfig(init_rank=48, max_rank=48, target_modules=".*dense"))
    torch.save({"state_dict": model.state_dict(), "pytorch-lightning_version": "2.6"}, tmp_path / "last.ckpt")
    main(["ranks", f"--ckpt_path={tmp_path / 'last.ckpt'}"])
    out = capsys.readouterr().out
    assert "\u2026" not in out
    assert max(len(bars) for bars in re.findall("[\u2581-\u2588]+", out)) == 48


def test_an_export_reads_numbers_as_fit_does(tmp_path):
    """A user wrote 1e-1 into the configuration: fit read a number, and export a text. Both read a number."""
    text = "model: {class_path: small.Small, init_args: {rate: 1e-1, more: {drop: 1e-2}}}  # \u00e9\n"
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    assert _configured(tmp_path / "config.yaml")["init_args"] == {"rate": 0.1, "more": {"drop": 0.01}}


def test_an_export_knows_optimizers_and_schedules_by_name_as_fit_does(tmp_path):
    """A user wrote them by name into the configuration: fit took them, and export did not. Both take torch's AdamW."""
    another = type("AdamW", (torch.optim.AdamW,), {"__module__": "another"})  # as bitsandbytes has one
    settings = {
        "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.5}},
        "lr_scheduler": {"class_path": "ReduceLROnPlateau", "init_args": {"monitor": "val_loss"}},
    }
    module = build_module({"class_path": "small.Small", "init_args": settings}, {})
    optimizer = module.optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is torch.optim.AdamW is not another
    assert optimizer.defaults["lr"] == 0.5
    assert module.lr_scheduler(optimizer).monitor == "val_loss"


# Reports of runs that went wrong


def test_a_report_of_a_run_that_left_all_bounds(tmp_path):
    """A loss ran off to 1e308 before it was stopped, and report ended in a traceback. There is a page."""
    rows = ["step,geolora/mean_rank,rank/a,train_loss", "0,2,2,1.0", "10,2,1e300,1e308", "20,3,3,-1e308"]
    (tmp_path / "metrics.csv").write_text("\n".join(rows) + "\n")
    assert write_report(tmp_path).is_file()
    (tmp_path / "metrics.csv").write_text("step,train_loss\n99999999999999999999999,1\n")
    with pytest.raises(ValueError, match="is not a table of metrics"):
        write_report(tmp_path)


def test_a_report_of_an_event_file_without_a_number(tmp_path):
    """A user asked for the report of a damaged event file, and got an empty page. It is refused."""
    (tmp_path / "events.out.tfevents.1").write_bytes(b"garbage" * 100)
    with pytest.raises(ValueError, match="holds no number: its log is empty or broken"):
        write_report(tmp_path)
