"""Read checkpoints completely or refuse them, and leave the base out of small ones."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from geolora_pl.adapters.inject import find_adapters
from geolora_pl.math.ranks import RankRule
from geolora_pl.storage.fingerprint import base_hash, base_parameters, is_same_base, trained_names

_BROKEN = (EOFError, RuntimeError, ValueError, LookupError, zipfile.BadZipFile)
_MARK = "geolora_base"  # the key, in a small checkpoint, of what describes the base that it leaves out


def read_checkpoint(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint of a run, or say why the file cannot be used as one.

    Every byte is compared with the checksums in the file, because torch loads changed weights without a warning.

    Args:
        path: The file.
        mmap: Whether tensors stay in the file until they are used.

    Returns:
        The content of the file, on the CPU.

    Raises:
        ValueError: The file does not exist, is cut short or changed, or is not a checkpoint of a run.
    """
    path = Path(path)
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "not a file"
        raise ValueError(f"ckpt_path={str(path)!r} is {kind} (from {Path.cwd()}): name the .ckpt file of a run")
    try:
        checkpoint = _load(path, mmap)
    except OSError as error:
        raise ValueError(f"ckpt_path={str(path)!r} cannot be opened ({error.strerror}): fix its permissions") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"ckpt_path={str(path)!r} holds objects that are not loaded with weights_only=True: keep to plain values "
            "in save_hyperparameters, or, if you trust the file, set weights_only to false"
        ) from error
    except _BROKEN as error:
        raise ValueError(
            f"ckpt_path={str(path)!r} cannot be read: it is cut short, changed, or not a checkpoint at all; go back to "
            "an earlier .ckpt file of the run"
        ) from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "pytorch-lightning_version"} <= checkpoint.keys():
        names = list(checkpoint)[:3] if isinstance(checkpoint, dict) else [type(checkpoint).__name__]
        raise ValueError(
            f"ckpt_path={str(path)!r} holds {', '.join(map(str, names)) or 'nothing'} and is not a checkpoint of a "
            "run: name a .ckpt file that the trainer saved"
        )
    return checkpoint


def rule_of(checkpoint: Mapping[str, Any]) -> RankRule | None:
    """The rule by which the run of a checkpoint chooses ranks; ``None`` if it gives none that makes sense."""
    callbacks = checkpoint.get("callbacks")
    for state in callbacks.values() if isinstance(callbacks, Mapping) else ():
        try:
            return RankRule(**state["integrator"]["rule"])
        except (KeyError, TypeError, ValueError):  # of another callback, or of an older version
            continue
    return None


def _load(path: Path, mmap: bool) -> object:
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):  # torch has written zip files since 1.6
            raise zipfile.BadZipFile
        with zipfile.ZipFile(file) as archive:
            if archive.testzip() is not None:
                raise zipfile.BadZipFile
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def check_probes(checkpoint: Mapping[str, Any], module: nn.Module) -> None:
    """Refuse a checkpoint that training cannot go on from, because its adapters have another number of probes.

    Its weights can be loaded. But what the probes have gathered is missing then, and the optimizer's state has columns
    for other directions than the model.

    Args:
        checkpoint: The checkpoint of Lightning.
        module: A module with adapters in it.

    Raises:
        ValueError: The numbers differ.
    """
    factors = checkpoint.get("state_dict", {})
    for name, layer in find_adapters(module).items():
        U, S = factors.get(f"{name}.U"), factors.get(f"{name}.S")
        if U is None or S is None or U.dim() != 2 or S.dim() != 2:
            continue  # loading the weights says what is wrong with them
        if (theirs := U.shape[1] - S.shape[1]) != layer.probes:
            raise ValueError(
                f"the run of the checkpoint has {theirs} probes per adapter and this model has {layer.probes}, so its "
                f"training cannot go on: set probes={theirs} of the adapters, as the run has it, or export the "
                "checkpoint as an adapter and start a new run from its weights"
            )


def describe_base(module: nn.Module) -> dict[str, Any]:
    """What a small checkpoint stores about the base: its hash, and the names of what else is trained."""
    trained = trained_names(module)
    return {"hash": base_hash(module, trained), "trained": trained}


def shrink(checkpoint: dict[str, Any], module: nn.Module, base: dict[str, Any]) -> None:
    """Leave the frozen weights of the base out of a checkpoint, in place.

    Args:
        checkpoint: The checkpoint of Lightning, with the whole ``state_dict``.
        module: The module that was saved.
        base: The description of its base by :func:`describe_base`.
    """
    if arguments := getattr(module, "base_arguments", ()):  # only a small checkpoint needs its source
        given: Any = module.hparams_initial
        checkpoint["hyper_parameters"] |= {name: given[name] for name in arguments}
    left_out = _frozen_names(module, base["trained"])
    checkpoint["state_dict"] = {name: v for name, v in checkpoint["state_dict"].items() if name not in left_out}
    checkpoint[_MARK] = base


def is_small(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint leaves the frozen weights of the base out."""
    return _MARK in checkpoint


def complete(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Put the weights of the module's own base into a small checkpoint, in place; a whole one does not change.

    Args:
        checkpoint: The checkpoint of Lightning.
        module: A module with adapters in it, on the base that the checkpoint was made with.

    Raises:
        ValueError: The module has another base.
    """
    base = checkpoint.pop(_MARK, None)
    if base is None:
        return
    if not is_same_base(base_hash(module, base["trained"]), base["hash"]):
        raise ValueError(
            "the checkpoint holds only the trained weights, and this base is not the one that they were trained on "
            "(its weights have another hash): load the same pretrained weights"
        )
    frozen = _frozen_names(module, base["trained"])
    of_base = {name: value for name, value in module.state_dict().items() if name in frozen}
    checkpoint["state_dict"] = of_base | checkpoint["state_dict"]


def _frozen_names(module: nn.Module, trained: Collection[str]) -> set[str]:
    """All names that frozen weights of the base have in a ``state_dict``."""
    frozen = {id(parameter) for name, parameter in base_parameters(module).items() if name not in trained}
    return {name for name, p in module.named_parameters(remove_duplicate=False) if id(p) in frozen}
