import os
from dataclasses import replace

import lightning as L
import pytest
import timm
import torch
from foreign import ADAPTER, Foreign, loader, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from safetensors.torch import save_file
from small import Small
from torch.utils.data import DataLoader, TensorDataset

from geolora_pl import AdapterConfig, GeoLoRACallback, inject_adapters
from geolora_pl.adapters.inject import find_adapters
from geolora_pl.lightning.checkpoint_io import WholeFiles
from geolora_pl.math.decomposition import without_probes
from geolora_pl.storage.checkpoint import complete
from geolora_pl.tasks import ImageClassification


def train(folder, module, small=True, adapter=ADAPTER):
    callback = GeoLoRACallback(adapter=adapter, small_checkpoints=small)
    runs = trainer(callback, ModelCheckpoint(folder, save_last=True), max_epochs=2)
    runs.fit(module, loader())
    return folder / "last.ckpt"


def evaluate(module, path, adapter=ADAPTER):
    runs = trainer(GeoLoRACallback(adapter=adapter))
    return runs.test(module, loader(), ckpt_path=path, weights_only=True, verbose=False)[0]["val_loss"]


def test_a_small_checkpoint_holds_what_is_trained_and_the_base_comes_from_its_source(tmp_path):
    module = Foreign()
    path = train(tmp_path, module)
    names = torch.load(path, weights_only=True)["state_dict"].keys()
    factors = {f"body.{i}.{factor}" for i in (0, 2) for factor in "USVKL"}
    assert names == factors | {"head.weight", "head.bias"}
    expected = evaluate(Foreign(), train(tmp_path / "whole", Foreign(), small=False))
    assert evaluate(Foreign(), path) == expected


def test_a_small_checkpoint_resumes_as_a_whole_one_does(tmp_path):
    resumed = []
    for small in (True, False):
        path = train(tmp_path / str(small), Foreign(), small)
        module = Foreign()
        callback = GeoLoRACallback(adapter=ADAPTER)
        trainer(callback, max_epochs=4).fit(module, loader(), ckpt_path=path, weights_only=True)
        resumed.append(module.state_dict())
    for name, tensor in resumed[0].items():
        assert torch.equal(tensor, resumed[1][name]), name


def test_another_base_is_refused_and_nothing_is_loaded(tmp_path):
    path = train(tmp_path, Foreign())
    other = Foreign()
    with torch.no_grad():
        other.body[0].weight[0, 0] += 1
    before = other.head.weight.clone()
    with pytest.raises(ValueError, match="this base is not the one that they were trained on"):
        evaluate(other, path)
    assert torch.equal(other.head.weight, before)


class Own(Foreign):
    """Has adapters of its own, so that whatever is loaded into them can be seen."""

    def __init__(self, probes):
        super().__init__()
        inject_adapters(self, replace(ADAPTER, probes=probes))


@pytest.mark.parametrize(("before", "now"), [(0, 2), (3, 2), (2, 0)])
def test_a_run_with_another_number_of_probes_does_not_go_on_but_its_weights_are_loaded(tmp_path, before, now):
    module = Own(before)
    path = train(tmp_path, module, small=False, adapter=None)
    other = Own(now)
    untouched = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    message = f"has {before} probes per adapter and this model has {now}, .* set probes={before} .* or export"
    with pytest.raises(ValueError, match=message) as error:
        trainer(GeoLoRACallback(), max_epochs=4).fit(other, loader(), ckpt_path=path, weights_only=True)
    assert "\n" not in str(error.value)
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in other.state_dict().items())

    assert evaluate(other, path, adapter=None) == evaluate(Own(before), path, adapter=None)
    for name, layer in find_adapters(other).items():
        theirs = find_adapters(module)[name]
        for ours, expected in zip(factors_without_probes(layer), factors_without_probes(theirs), strict=True):
            assert torch.equal(ours, expected)
        assert not layer.U[:, : layer.probes].any()

    same = Own(before)
    trainer(GeoLoRACallback(), max_epochs=4).fit(same, loader(), ckpt_path=path, weights_only=True)
    assert same.trainer.global_step == 24


def factors_without_probes(layer):
    return without_probes(*(getattr(layer, factor) for factor in "USVKL"))


def test_a_task_with_another_number_of_probes_is_refused_by_the_same_words(tmp_path):
    adapter = AdapterConfig(max_rank=4, probes=1)
    path = train(tmp_path, Small(adapter=adapter), small=False, adapter=None)
    other = Small(adapter=replace(adapter, probes=2))
    with pytest.raises(ValueError, match="has 1 probes per adapter and this model has 2"):
        trainer(GeoLoRACallback(), max_epochs=4).fit(other, loader(), ckpt_path=path, weights_only=True)
    expected = Small.load_from_checkpoint(path).model(torch.ones(1, 10))
    assert torch.equal(Small.load_from_checkpoint(path, adapter=other.adapter).model(torch.ones(1, 10)), expected)
    evaluate(Small(adapter=other.adapter), path, adapter=None)


class Moved(Small):
    def build_model(self):
        model = super().build_model()
        torch.nn.init.zeros_(model[0].bias)
        return model


def test_load_from_checkpoint_completes_a_small_one(tmp_path):
    module = Small()
    path = train(tmp_path, module, adapter=None)
    loaded = Small.load_from_checkpoint(path, weights_only=True)
    for (name, a), (_, b) in zip(module.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(ValueError, match="this base is not the one"):
        Moved.load_from_checkpoint(path, weights_only=True)


def test_a_whole_checkpoint_is_left_alone():
    checkpoint = {"state_dict": {"a": 1}}
    complete(checkpoint, torch.nn.Linear(1, 1))
    assert checkpoint == {"state_dict": {"a": 1}}


class Full:
    """A disk without space."""

    def __init__(self, error):
        self.error = error

    def __call__(self, checkpoint, file):
        file.write(b"half")
        raise self.error


on_the_way_out = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 923008 vs 922896")
on_the_way_out.__context__ = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        on_the_way_out,
        RuntimeError("PytorchStreamWriter failed"),
        KeyboardInterrupt(),
    ],
)
def test_what_cannot_be_written_leaves_the_earlier_file(tmp_path, monkeypatch, error):
    files, path = WholeFiles(torch.nn.Linear(1, 1)), tmp_path / "last.ckpt"
    files.save_checkpoint({"a": 1}, path)
    monkeypatch.setattr(torch, "save", Full(error))
    expected = type(error) if isinstance(error, KeyboardInterrupt) else OSError
    with pytest.raises(expected):
        files.save_checkpoint({"a": 2}, path)
    assert os.listdir(tmp_path) == ["last.ckpt"]
    assert torch.load(path, weights_only=True) == {"a": 1}


def test_a_new_file_has_the_usual_permissions(tmp_path):
    files = WholeFiles(torch.nn.Linear(1, 1))
    files.save_checkpoint({"a": 1}, tmp_path / "ours.ckpt")
    (tmp_path / "plain").touch()
    assert (tmp_path / "ours.ckpt").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused_in_one_sentence(tmp_path, keep):
    path = train(tmp_path, Foreign())
    content = path.read_bytes()
    path.write_bytes(content[: keep if keep >= 1 or keep == 0 else int(keep * len(content))])
    with pytest.raises(ValueError, match=r"last\.ckpt' cannot be read: .* go back to an earlier \.ckpt file"):
        evaluate(Foreign(), path)


def test_a_checkpoint_plugin_of_the_user_is_left_alone(tmp_path):
    class Own(TorchCheckpointIO):
        pass

    own = Own()
    runs = trainer(GeoLoRACallback(adapter=ADAPTER), plugins=[own])
    runs.fit(Foreign(), loader())
    assert runs.strategy.checkpoint_io is own


def test_the_files_of_a_run_are_whole_files():
    runs = trainer(GeoLoRACallback(adapter=ADAPTER))
    runs.fit(Foreign(), loader())
    assert isinstance(runs.strategy.checkpoint_io, WholeFiles)
    assert type(L.Trainer(logger=False).strategy.checkpoint_io) is TorchCheckpointIO


def test_a_base_that_training_moves_is_no_small_checkpoint(tmp_path):
    """Biases that are trained count to what is trained, not to the base."""
    adapter = AdapterConfig(target_modules=["body.0"], modules_to_save=["head"], train_bias=True)
    path = train(tmp_path, Foreign(), adapter=adapter)
    assert "body.0.base.bias" in torch.load(path, weights_only=True)["state_dict"]
    evaluate(Foreign(), path, adapter)


def test_a_small_checkpoint_of_a_task_takes_its_base_from_where_the_caller_says(tmp_path):
    tiny = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "in_chans": 1}
    source = tmp_path / "base.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", **tiny).state_dict(), source)
    task = ImageClassification("vit_tiny_patch16_224", num_classes=2, checkpoint_path=str(source), model_args=tiny)
    images = TensorDataset(torch.randn(32, 1, 8, 8), torch.arange(32) % 2)
    callback = GeoLoRACallback(small_checkpoints=True)
    saved = ModelCheckpoint(tmp_path, save_last=True)
    trainer(callback, saved).fit(task, DataLoader(images, 8))
    with pytest.raises(ValueError, match=f"leaves out; it names {str(source)!r}.*give the run's configuration"):
        ImageClassification.load_from_checkpoint(tmp_path / "last.ckpt", pretrained=False)
    base = {"pretrained": False, "checkpoint_path": str(source)}
    loaded = ImageClassification.load_from_checkpoint(tmp_path / "last.ckpt", **base)
    for (name, a), (_, b) in zip(task.model.state_dict().items(), loaded.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    source.unlink()
    with pytest.raises(ValueError, match="is not a file"):
        ImageClassification.load_from_checkpoint(tmp_path / "last.ckpt", **base)
