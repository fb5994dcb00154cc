"""What users have reported of checkpoints from elsewhere: from addresses, from strangers, and from damaged disks."""

import contextlib
import functools
import http.server
import io
import os
import threading
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from foreign import ADAPTER, Foreign, loader, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from small import Small

from geolora_pl import GeoLoRACallback, load_adapter, save_adapter
from geolora_pl.adapters.inject import find_adapters
from geolora_pl.lightning.hyperparameters import keep_plain
from geolora_pl.storage.adapter_file import read_adapter
from geolora_pl.storage.checkpoint import read_checkpoint
from geolora_pl.tasks import ImageClassification

VERSION = {"pytorch-lightning_version": "2.6.0"}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def address(tmp_path):
    """Where this machine offers the files of the test's folder."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class Code:
    """Makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


def callback():
    return GeoLoRACallback(adapter=ADAPTER, adapt_every=2)


# Addresses


def test_a_checkpoint_from_an_address_runs_no_code(tmp_path, address):
    """A user resumed from an address, and the file there ran its code. It is refused, like a file on the disk."""
    torch.save({"state_dict": {}, **VERSION, "x": Code(tmp_path / "ran")}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"last\.ckpt' holds objects that are not loaded with weights_only=True"):
        trainer(callback()).fit(Foreign(), loader(), ckpt_path=f"{address}/last.ckpt")
    assert not (tmp_path / "ran").exists()


def test_the_same_name_at_two_addresses_is_two_checkpoints(tmp_path, address):
    """A user loaded last.ckpt of one run and then that of another, and got the first again. Each address is read."""
    for width in (5, 7):
        (tmp_path / str(width)).mkdir()
        module = Small(width=width)
        trainer(GeoLoRACallback(adapt_every=2), ModelCheckpoint(tmp_path / str(width), filename="last")).fit(
            module, loader()
        )
    for width in (5, 7):
        assert Small.load_from_checkpoint(f"{address}/{width}/last.ckpt").width == width
        runs = trainer(GeoLoRACallback())
        trusted = {"ckpt_path": f"{address}/{width}/last.ckpt", "weights_only": False}
        runs.validate(Small(width=width), loader(), verbose=False, **trusted)  # or the weights would not fit


def test_a_checkpoint_from_an_address_is_as_whole_as_one_on_the_disk(tmp_path, address):
    """A download was changed on its way, and was loaded. It is refused as a file would be, and so is an open file."""
    torch.save({"state_dict": {"w": torch.arange(1000.0)}, **VERSION}, tmp_path / "last.ckpt")
    content = (tmp_path / "last.ckpt").read_bytes()
    assert read_checkpoint(f"{address}/last.ckpt")["state_dict"]["w"].sum() == 499500
    assert read_checkpoint(io.BytesIO(content))["state_dict"]["w"].sum() == 499500
    middle = content.index(torch.arange(1000.0).numpy().tobytes()) + 2000
    changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    (tmp_path / "last.ckpt").write_bytes(changed)
    for source in (f"{address}/last.ckpt", io.BytesIO(changed)):
        with pytest.raises(ValueError, match="cannot be read: it is cut short, changed"):
            read_checkpoint(source)


@pytest.mark.parametrize("name", ["none.ckpt", "unknown://x/last.ckpt"])
def test_an_address_without_a_checkpoint_is_one_sentence(address, name):
    """A user mistyped an address. The error names it and says what to do."""
    source = name if "://" in name else f"{address}/{name}"
    with pytest.raises(ValueError, match=rf"ckpt_path='{source}' cannot be fetched \(.*\): correct the address"):
        read_checkpoint(source)


# What a resumed run removes


@pytest.mark.parametrize("key", ["last_model_path", "best_model_path", "kth_best_model_path", "best_k_models"])
@pytest.mark.parametrize("moved", [False, True])
def test_a_resumed_run_removes_nothing_of_the_users(tmp_path, key, moved):
    """A checkpoint of a stranger named a folder of the user's as one to be removed. It stays."""
    thesis, folder = tmp_path / "thesis", tmp_path / "run"
    thesis.mkdir()
    (thesis / "chapter1.tex").write_text("x")

    trainer(callback(), ModelCheckpoint(folder, save_last=True)).fit(Foreign(), loader())
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    state = next(state for state in checkpoint["callbacks"].values() if "best_k_models" in state)
    there = str(folder / ".." / "thesis")
    state[key] = {there: 9.0} if key == "best_k_models" else there
    if moved:
        state["dirpath"] = str(tmp_path)
    torch.save(checkpoint, tmp_path / "stranger.ckpt")
    with pytest.warns(UserWarning, match="dirpath has changed") if moved else contextlib.nullcontext():
        trainer(callback(), ModelCheckpoint(folder, save_last=True), max_epochs=2).fit(
            Foreign(), loader(), ckpt_path=tmp_path / "stranger.ckpt"
        )
    assert (thesis / "chapter1.tex").read_text() == "x"


def test_a_resumed_run_knows_its_own_checkpoints(tmp_path):
    """A run went on in its folder, and what it had saved there is still replaced by what is newer."""
    for epochs, path in ((1, None), (2, tmp_path / "last.ckpt")):
        files = ModelCheckpoint(tmp_path, save_last=True, filename="{epoch}")
        trainer(callback(), files, max_epochs=epochs).fit(Foreign(), loader(), ckpt_path=path)
    assert sorted(os.listdir(tmp_path)) == ["epoch=1.ckpt", "last.ckpt"]


# Damage


@pytest.mark.parametrize(
    "damage",
    [
        {"geolora_left_out": ["a"]},
        {"hyper_parameters": {"model_name": ["x"]}},
        {"hyper_parameters": {"model_name": "vit_tiny_patch16_224", "num_classes": "many"}},
        {"callbacks": [1]},
    ],
    ids=lambda damage: next(iter(damage)),
)
def test_a_damaged_checkpoint_is_one_sentence_in_python_as_well(tmp_path, damage):
    """A user loaded a damaged file, and got an AttributeError from somewhere within. The error names the file."""
    torch.save({"state_dict": {}, **VERSION, **damage}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"last\.ckpt'"):
        ImageClassification.load_from_checkpoint(tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    "value", [np.datetime64("2020-01-01"), np.array([object()]), np.array([{1: 2}, 3], object), np.longdouble(1)]
)
def test_no_value_makes_a_checkpoint_that_cannot_be_loaded(tmp_path, value):
    """A user gave a date of numpy, and no checkpoint of the run could be read. What is not plain is left out."""
    checkpoint = {"state_dict": {}, **VERSION, "hyper_parameters": {"value": value, "width": np.int64(3)}}
    keep_plain(checkpoint)
    torch.save(checkpoint, tmp_path / "last.ckpt")
    read = read_checkpoint(tmp_path / "last.ckpt")
    assert read["hyper_parameters"].pop("width") == 3
    assert read["hyper_parameters"] or "value" in read["geolora_left_out"]


# What a run leaves in its folder


class Scored(Foreign):
    """Its first checkpoint is the best."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", torch.tensor(1.0 + abs(self.current_epoch - 1)))


def test_a_last_checkpoint_that_was_a_link_to_the_best_does_not_replace_the_best(tmp_path):
    """A run with save_last="link" was resumed and became no better: its last weights came in the place of the best."""
    best = tmp_path / "epoch=1.ckpt"
    for epochs, path in ((2, None), (3, tmp_path / "last.ckpt")):
        files = ModelCheckpoint(tmp_path, monitor="val_loss", save_last="link", filename="{epoch}")
        trainer(callback(), files, max_epochs=epochs).fit(Scored(), loader(), loader(), ckpt_path=path)
        assert files.best_model_path == str(best)
        assert (tmp_path / "last.ckpt").is_symlink() == (epochs == 2)
    assert torch.load(best, weights_only=True)["global_step"] == 12
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 18


class Moving(L.Callback):
    """Trains a frozen normalisation from the second epoch on, and the head in the first alone."""

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            module.model[4].requires_grad_(False)
            norm = module.model[3].requires_grad_(True)
            trainer.optimizers[0].add_param_group({"params": list(norm.parameters()), "lr": 0.1})


@pytest.mark.parametrize("every", [1, 2])
def test_a_small_checkpoint_holds_what_a_callback_begins_to_train_later(tmp_path, every):
    """A callback of a user's thawed a part of the base after the first checkpoint. It was in none of the later ones."""
    module = Small(lr_scheduler=torch.optim.lr_scheduler.ConstantLR)
    files = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}", every_n_epochs=every)
    moves = GeoLoRACallback(adapt_every=2, small_checkpoints=True)
    trainer(moves, Moving(), files, max_epochs=2).fit(module, loader())
    untrained = Small()
    untrained.configure_model()
    assert not torch.equal(module.model[3].weight, untrained.model[3].weight)
    loaded = Small.load_from_checkpoint(tmp_path / "epoch=1.ckpt").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in module.state_dict().items())


class Rooted(Small):
    def __init__(self, root=Path("data"), **kwargs):
        super().__init__(**kwargs)


@pytest.mark.parametrize("small", [False, True])
def test_a_checkpoint_of_weights_alone_is_like_the_others(tmp_path, small):
    """Lightning asks no callback of such a checkpoint: a path among the arguments made it one that nothing loads."""
    module = Rooted()
    files = ModelCheckpoint(tmp_path, save_weights_only=True, filename="last")
    trainer(GeoLoRACallback(adapt_every=2, small_checkpoints=small), files).fit(module, loader())
    assert ("model.3.weight" in read_checkpoint(tmp_path / "last.ckpt")["state_dict"]) != small
    x = torch.randn(3, 10)
    assert torch.equal(Rooted.load_from_checkpoint(tmp_path / "last.ckpt").model(x), module.model(x))
    plain = Rooted()
    plain.model = plain.build_model()
    load_adapter(plain, tmp_path / "last.ckpt")
    assert torch.equal(plain.model(x), module.model(x))


@pytest.mark.usefixtures("one_thread")
def test_a_forked_process_sends_its_weights_back_as_they_are(tmp_path):
    """It writes them as a file of Lightning's, which is no checkpoint and is described by nothing."""
    module = Small()
    module.configure_model()
    start = module.model[4].weight.clone()
    moves = GeoLoRACallback(adapt_every=2, small_checkpoints=True)
    trainer(moves, devices=1, strategy="ddp_fork", default_root_dir=tmp_path).fit(module, loader())
    assert not torch.equal(module.model[4].weight, start)


def test_a_file_from_a_checkpoint_keeps_to_the_budget_of_the_run_in_python_as_well(tmp_path):
    """Between two retractions an update has more directions: those that the export left out were in save_adapter."""
    module = Small()
    files = ModelCheckpoint(tmp_path, every_n_train_steps=5, filename="a")
    trainer(GeoLoRACallback(tau=0.0, budget=60, adapt_every=3), files).fit(module, loader())
    plain = Small()
    plain.model = plain.build_model()
    load_adapter(plain, tmp_path / "a.ckpt")
    for loaded in (plain, Small.load_from_checkpoint(tmp_path / "a.ckpt")):
        assert any(layer.K[:, layer.probes :].any() for layer in find_adapters(loaded).values())
        save_adapter(loaded, tmp_path / "a.safetensors")
        factors = read_adapter(tmp_path / "a.safetensors").factors.values()
        assert 0 < sum(len(S) * (len(U) + len(V)) for U, S, V in factors) <= 60
