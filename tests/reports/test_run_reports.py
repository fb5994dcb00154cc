"""What users have reported of runs, files and the command line, each as it must be."""

import contextlib
import os
import threading
import types

import lightning as L
import pytest
import torch
from foreign import ADAPTER, trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, OnExceptionCheckpoint
from recorded import BATCHES, Noisy, Recorded
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from geolora_pl import GeoLoRACallback, GeoLoRAWarning, export_peft, inject_adapters
from geolora_pl.data import Digits
from geolora_pl.lightning.checkpoint_io import WholeFiles
from geolora_pl.storage.atomic import atomic

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
    with pytest.warns(GeoLoRAWarning, match="persistent_workers=True: .* exact only if the data set draws none"):
        losses(Working(validated=False), ckpt_path=tmp_path / "step=1.ckpt", epochs=1)


@pytest.mark.parametrize("augment", [None, {"hflip": 0.5}])
def test_augmented_images_have_no_persistent_workers(augment):
    """The package's own images with augmentation and workers were not resumed exactly. Their workers begin afresh."""
    data = Digits(num_workers=1, augment=augment)
    data.trainer = types.SimpleNamespace(lightning_module=types.SimpleNamespace(data_config=DIGITS))
    data.setup("fit")
    assert data.train_dataloader().persistent_workers == (augment is None)
    assert data.val_dataloader().persistent_workers
