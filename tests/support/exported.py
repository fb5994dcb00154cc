"""Checkpoints of small models that training has moved, and what goes with them."""

import json

import lightning as L
import pytest
import torch

from geolora_pl.adapters.inject import find_adapters
from geolora_pl.cli.dispatch import main

SIZE = {"img_size": 28, "patch_size": 14, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}


def move(module):
    """What training does, in short."""
    with torch.no_grad():
        for index, layer in enumerate(find_adapters(module).values()):
            layer.S[: layer.rank, : layer.rank].normal_()
            layer.K[:, : layer.probes + index % 2].normal_()
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and name[-2:] not in {".K", ".L"}:
                parameter.normal_()
    return module.eval()


def save(module, path, class_path=None):
    """A checkpoint as Lightning writes it, from Python, or with a class path from the command line."""
    if class_path is not None:
        module.hparams["_class_path"] = class_path
        module.hparams["_instantiator"] = "lightning.pytorch.cli.instantiate_module"
        module._hparams_name = "kwargs"
    trainer = L.Trainer(logger=False, accelerator="cpu")
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return str(path)


def settings_of(folder, name, **settings):
    """The configuration of a run of a task, for the checkpoint of one that was started from Python."""
    path = folder / "config.yaml"
    path.write_text(json.dumps({"model": {"class_path": f"geolora_pl.tasks.{name}", "init_args": settings}}))
    return path


def fails(command, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code != 0
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
