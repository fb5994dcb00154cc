"""Read checkpoints completely or refuse them, and leave the base out of small ones."""

from __future__ import annotations

import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import torch
from torch import nn

from geolora_pl.adapters.config import AdapterConfig
from geolora_pl.adapters.counts import Counts
from geolora_pl.adapters.inject import find_adapters, has_adapters, inject_adapters, remove_adapters
from geolora_pl.adapters.names import alternation
from geolora_pl.adapters.quantised import loadable_state
from geolora_pl.adapters.wrappers import plain_name, unwrapped, wrapper_names
from geolora_pl.errors import in_one_line
from geolora_pl.math.ranks import RankRule
from geolora_pl.storage.adapter_state import adapted_names, config_of
from geolora_pl.storage.fingerprint import base_hash, base_parameters, is_same_base, refuse_frozen, trained_names

_BROKEN = (EOFError, RuntimeError, ValueError, LookupError, zipfile.BadZipFile)
_MARK = "geolora_base"  # the key, in a small checkpoint, of what describes the base that it leaves out
CURRENT = "current_model_state"  # of the weights as trained, where the state_dict holds averaged ones; Lightning's name
_ADAPTERS = "geolora_adapters"  # the key of what the weights alone do not tell of the adapters


def read_checkpoint(path: str | Path | BinaryIO, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint of a run, or say why the file cannot be used as one.

    Every byte is compared with the checksums in the file, because torch loads changed weights without a warning. No
    code in it is run, wherever it comes from.

    Args:
        path: The file, its address (``https://...``, ``s3://...``), or an open file.
        mmap: Whether tensors of a file on the disk stay there until they are used.

    Returns:
        The content of the file, on the CPU.

    Raises:
        ValueError: The file does not exist, is cut short or changed, or is not a checkpoint of a run.
    """
    with found(path) as file:
        checkpoint = _read(file, path, mmap)
    weights = checkpoint.get("state_dict", {}) if isinstance(checkpoint, dict) else {}
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise ValueError(f"ckpt_path={str(path)!r} has a state_dict that is not weights by name: it was changed")
    if not isinstance(checkpoint, dict) or not {"state_dict", "pytorch-lightning_version"} <= checkpoint.keys():
        names = list(checkpoint)[:3] if isinstance(checkpoint, dict) else [type(checkpoint).__name__]
        raise ValueError(
            f"ckpt_path={str(path)!r} holds {', '.join(map(str, names)) or 'nothing'} and is not a checkpoint of a "
            "run: name a .ckpt file that the trainer saved"
        )
    for key in (_MARK, _ADAPTERS, CURRENT):
        if not isinstance(checkpoint.get(key, {}), dict):
            raise ValueError(f"ckpt_path={str(path)!r} has {key} that are no values by name: it was changed")
    if not isinstance(checkpoint.get("callbacks", {}), dict):
        raise ValueError(f"ckpt_path={str(path)!r} has callbacks that are not states by name: it was changed")
    return checkpoint


@contextmanager
def loads(path: str | Path | BinaryIO, kind: str) -> Iterator[None]:
    """Say of a checkpoint whose content makes no sense that it cannot be loaded, in place of an error from within.

    Args:
        path: The checkpoint.
        kind: What is made of it.
    """
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # each library has errors of its own for sizes that make no sense
        raise ValueError(f"ckpt_path={str(path)!r} cannot be loaded as {kind}: {in_one_line(error)[:300]}") from error


@contextmanager
def found(path: str | Path | BinaryIO) -> Iterator[Path | BinaryIO]:
    """The file on the disk, the open file, or a copy of what lies at the address.

    Lightning keeps what it fetches by the last part of its name, so that of two runs it gives the same last.ckpt.

    Args:
        path: The file, its address, or an open file.

    Raises:
        ValueError: There is no such file, or it cannot be fetched.
    """
    if not isinstance(path, (str, Path)):
        yield path
    elif "://" in str(path):
        with tempfile.TemporaryFile() as copy:  # torch jumps about in a file, which not every server allows
            try:
                with fsspec.open(str(path), "rb") as there:
                    shutil.copyfileobj(there, copy)
            except Exception as error:  # each kind of address has errors of its own
                raise ValueError(
                    f"ckpt_path={str(path)!r} cannot be fetched ({in_one_line(error)}): correct the address, or name a "
                    "file"
                ) from error
            copy.seek(0)
            yield copy
    else:
        path = Path(path)
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "not a file"
            raise ValueError(f"ckpt_path={str(path)!r} is {kind} (from {Path.cwd()}): name the .ckpt file of a run")
        yield path


def _read(file: Path | BinaryIO, path: object, mmap: bool) -> object:
    try:
        return _load(file, mmap)
    except OSError as error:
        raise ValueError(f"ckpt_path={str(path)!r} cannot be opened ({error.strerror}): fix its permissions") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"ckpt_path={str(path)!r} holds objects that are not loaded with weights_only=True, because a file may run "
            "code by them: if you trust it, replace them by plain values (torch.load(..., weights_only=False), "
            "torch.save)"
        ) from error
    except _BROKEN as error:
        raise ValueError(
            f"ckpt_path={str(path)!r} cannot be read: it is cut short, changed, or not a checkpoint at all; go back to "
            "an earlier .ckpt file of the run"
        ) from error


def rule_of(checkpoint: Mapping[str, Any]) -> RankRule | None:
    """The rule by which the run of a checkpoint chooses ranks; ``None`` if it gives none that makes sense."""
    callbacks = checkpoint.get("callbacks")
    for state in callbacks.values() if isinstance(callbacks, Mapping) else ():
        try:
            return RankRule(**state["integrator"]["rule"])
        except (KeyError, TypeError, ValueError):  # of another callback, or of an older version
            continue
    return None


def follow_rule(checkpoint: Mapping[str, Any], module: nn.Module) -> None:
    """Let files that are written of a module choose the ranks as the run of its checkpoint does.

    Args:
        checkpoint: The checkpoint, whose weights may lie between two retractions.
        module: The module that they have been loaded into.
    """
    rule = rule_of(checkpoint)
    for layer in find_adapters(module).values():
        layer.rule = rule


def _load(file: Path | BinaryIO, mmap: bool) -> object:
    on_disk = isinstance(file, Path)
    with file.open("rb") if isinstance(file, Path) else nullcontext(file) as content:
        if not zipfile.is_zipfile(content):  # torch has written zip files since 1.6
            raise zipfile.BadZipFile
        with zipfile.ZipFile(content) as archive:
            # Torch does not compress, so that a small file cannot become large in memory.
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
            if packed or archive.testzip() is not None:
                raise zipfile.BadZipFile
        content.seek(0)
        source = file if on_disk else content
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap and on_disk)


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
    factors = plain_weights(checkpoint)
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


def describe_adapters(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Note in a checkpoint what its weights alone do not tell of the adapters, and what is trained beside them.

    Args:
        checkpoint: The checkpoint of Lightning, which is changed in place.
        module: The module that was saved.
    """
    adapters = find_adapters(module)
    checkpoint[_ADAPTERS] = {
        "alpha": {name: layer.scaling for name, layer in adapters.items()},
        "dropout": max((getattr(layer.dropout, "p", 0.0) for layer in adapters.values()), default=0.0),
        "layers": adapted_names(module),
        "trained": trained_names(module),
        "wrappers": wrapper_names(module),
        "parameters": asdict(Counts.of(module, adapters)),
    }


def counts_in(checkpoint: Mapping[str, Any]) -> Counts | None:
    """How many parameters the module of a checkpoint has; ``None`` if it does not say, as an older one."""
    noted = checkpoint.get(_ADAPTERS, {}).get("parameters")
    names = [field.name for field in fields(Counts)]
    if not isinstance(noted, Mapping) or not all(isinstance(noted.get(name), int) for name in names):
        return None
    counts = Counts(**{name: noted[name] for name in names})
    return counts if counts.per_rank > 0 and counts.base >= 0 else None


def plain_weights(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a checkpoint by the names that they have in a module without wrappers."""
    found = checkpoint.get(_ADAPTERS)
    listed = found.get("wrappers") if isinstance(found, Mapping) else None
    wrappers = {name for name in listed if isinstance(name, str)} if isinstance(listed, list) else set()
    return {plain_name(name, wrappers): value for name, value in checkpoint.get("state_dict", {}).items()}


def check_adapters(checkpoint: Mapping[str, Any], module: nn.Module, resumes: bool) -> None:
    """Refuse a checkpoint of which the module would make another function, or of which it would train another part.

    Args:
        checkpoint: The checkpoint of Lightning.
        module: A module with adapters in it.
        resumes: Whether a fit goes on from it, so that what is trained must be the same.

    Raises:
        ValueError: ``alpha`` differs, or what is trained beside the adapters.
    """
    theirs = checkpoint.get(_ADAPTERS)
    if theirs is None:  # an older checkpoint
        return
    for name, layer in find_adapters(module).items():
        if (alpha := theirs["alpha"].get(name, layer.scaling)) != layer.scaling:
            raise ValueError(
                f"alpha={layer.scaling} of {name} does not fit the checkpoint, which was made with {alpha}: set alpha "
                "of the adapters to that"
            )
    ours = trained_names(module)
    if resumes and (differ := sorted(set(ours) ^ set(theirs["trained"]))):
        here, there = ("is", "is not") if differ[0] in ours else ("is not", "is")
        raise ValueError(
            f"{differ[0]} {here} trained in this run and {there} in that of the checkpoint ({len(differ)} such "
            "parameters): set modules_to_save and train_bias of the adapters as they were, or resume from before a "
            "callback had thawed it"
        )


def config_of_adapters(checkpoint: Mapping[str, Any]) -> tuple[AdapterConfig, list[str]]:
    """The configuration that puts the adapters of a checkpoint into its base, and the names of what else is trained.

    Raises:
        ValueError: The checkpoint does not say it, or its adapters differ in ``alpha``.
    """
    found, state_dict = checkpoint.get(_ADAPTERS), plain_weights(checkpoint)
    if not found or not found["alpha"]:
        raise ValueError("it says nothing of its adapters: it was made by an older version, or without adapters")
    if len(alphas := set(found["alpha"].values())) > 1:
        raise ValueError(f"its adapters differ in alpha, {sorted(alphas)}: inject them by hand and load its state_dict")
    shapes = {name: (state_dict[f"{name}.S"].shape, state_dict[f"{name}.U"].shape) for name in found["alpha"]}
    ((_, R), (_, columns)) = next(iter(shapes.values()))
    config = config_of({name: S[1] for name, (S, _) in shapes.items()}, alphas.pop(), found["dropout"], columns - R)
    return replace(config, target_modules=alternation(found["layers"])), list(found["trained"])


def load_checkpoint(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Load a checkpoint into its module, plain or with the same adapters, completely or not at all.

    Args:
        model: The module whose ``state_dict`` the checkpoint holds; a plain one gets the adapters, and what was trained
            becomes trainable again.
        checkpoint: The content of the file; a small one is completed by the weights of the model.

    Raises:
        ValueError: They do not fit together.
    """
    config, trained = config_of_adapters(checkpoint)
    with unwrapped(model) as plain:
        _load_into(plain, {**checkpoint, "state_dict": plain_weights(checkpoint)}, config, frozenset(trained))


def _load_into(model: nn.Module, checkpoint: dict[str, Any], config: AdapterConfig, trained: Collection[str]) -> None:
    """Load a checkpoint whose weights have the names of this plain model."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    fresh = not has_adapters(model)
    try:
        if fresh:
            inject_adapters(model, config)
            for name, parameter in base_parameters(model).items():
                parameter.requires_grad_(name in trained)
        check_adapters(checkpoint, model, resumes=False)
        complete(checkpoint, model)
        weights = checkpoint["state_dict"]
        for name, layer in find_adapters(model).items():
            layer.fit_probes(weights, f"{name}.")
        shapes = {name: tensor.shape for name, tensor in loadable_state(model).items()}
        if wrong := [name for name in shapes.keys() | weights.keys() if _shape(weights.get(name)) != shapes.get(name)]:
            raise ValueError(f"{min(wrong)} is not the same in both ({len(wrong)} such weights)")
    except ValueError:
        if fresh and has_adapters(model):
            remove_adapters(model)
        for parameter, required in before:
            parameter.requires_grad_(required)
        raise
    model.load_state_dict(weights)
    follow_rule(checkpoint, model)


def _shape(value: object) -> torch.Size | None:
    return value.shape if isinstance(value, torch.Tensor) else None


def describe_base(module: nn.Module, earlier: Collection[str] | None = None) -> dict[str, Any]:
    """What a small checkpoint stores about the base: its hash, and the names of what else is trained.

    Args:
        module: With adapters.
        earlier: The names of what else has been trained, and may be frozen by now; ``None`` if that is not known.

    Raises:
        ValueError: That is not known, and the module is frozen as a whole.
    """
    if earlier is None:
        refuse_frozen(module)
    trained = sorted({*trained_names(module), *(earlier or ())})
    return {"hash": base_hash(module, trained), "trained": trained}


def leave_out_base(checkpoint: dict[str, Any], module: nn.Module, base: dict[str, Any]) -> None:
    """Leave the frozen weights of the base out of a checkpoint, in place.

    Args:
        checkpoint: The checkpoint of Lightning, with the whole ``state_dict``.
        module: The module that was saved.
        base: The description of its base by :func:`describe_base`.
    """
    if arguments := getattr(module, "base_arguments", ()):  # only a small checkpoint needs its source
        given: Any = module.hparams_initial
        checkpoint["hyper_parameters"] |= {name: given[name] for name in arguments}
    left_out = _frozen_names(module, base["trained"]) | (module.state_dict().keys() - loadable_state(module).keys())
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
    of_base = {name: value for name, value in loadable_state(module).items() if name in frozen}
    checkpoint["state_dict"] = of_base | checkpoint["state_dict"]


def _frozen_names(module: nn.Module, trained: Collection[str]) -> set[str]:
    """All names that frozen weights of the base have in a ``state_dict``."""
    left_out = frozenset(trained)
    frozen = {id(parameter) for name, parameter in base_parameters(module).items() if name not in left_out}
    return {name for name, p in module.named_parameters(remove_duplicate=False) if id(p) in frozen}
