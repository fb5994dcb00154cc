"""What a checkpoint may say about the module that is built for it: a file from a stranger must not decide what runs.

A file may bring numbers, names and the sizes of a model. It may not bring a class, a name on a hub, an address or a key
that allows remote code: these come from the user's own configuration or arguments.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn

from geolora_pl.errors import GeoLoRAWarning
from geolora_pl.storage.checkpoint import is_small

_BUILDS = {"class_path", "auto_map", "trust_remote_code"}  # keys that name code
_CODE = {"optimizer", "lr_scheduler"}  # arguments that are code
_FOREIGN = {"lightning", "torch", "builtins"}  # whose constructors take no hyperparameters
_LEFT_OUT = "geolora_left_out"  # the key, in a checkpoint, of hyperparameters that it does not hold
_OF_TORCH = (torch.Tensor, torch.Size, torch.dtype, torch.device)  # which a file may hold
_LOCATES = re.compile(r"[/\\:]")  # in every address, every path and every name on a hub that is not a library's own


def from_checkpoint(
    module_class: type[Any], checkpoint: Mapping[str, Any], configured: bool = False
) -> tuple[dict[str, Any], dict[str, str]]:
    """The arguments that a checkpoint may give to its module.

    Args:
        module_class: The class of a GeoLoRAModule, which the user named or which is a task of this package.
        checkpoint: The content of the file.
        configured: Whether there is a configuration of the user's beside the checkpoint. It says where the model lies,
            and gives every argument that the user's own class adds to those of this package.

    Returns:
        The arguments that are taken, and for each one that is not the reason why.
    """
    taken: dict[str, Any] = {}
    refused: dict[str, str] = {}
    takes = _taker(module_class, of_package=configured)
    for name, value in checkpoint.get(_LEFT_OUT, {}).items():
        if takes(name):
            refused[name] = f"is {value}, which is not a plain value"
    for name, value in hyperparameters_of(checkpoint).items():
        if name in _CODE or not takes(name):
            continue  # such as Lightning's own notes on the class and on what makes it
        if configured and name in module_class.locating_arguments:
            continue
        if name in module_class.base_arguments:
            if is_small(checkpoint):
                refused[name] = f"says where the base lies, which this small checkpoint leaves out; it names {value!r}"
            else:
                taken[name] = module_class.base_arguments[name]
            continue
        try:
            taken[name] = module_class.argument_from_checkpoint(name, value)
        except (ValueError, RecursionError) as error:
            refused[name] = str(error)
    return taken, refused


def keep_plain(checkpoint: dict[str, Any]) -> None:
    """Turn the hyperparameters in a checkpoint into plain values, in place, so that the file can be loaded safely.

    What has no plain value is left out, and the checkpoint says so for the error of a later load.
    """
    for key in ("hyper_parameters", "datamodule_hyper_parameters"):
        if isinstance(given := checkpoint.get(key), Mapping):
            checkpoint[key], left_out = _plain(given)
            if left_out and key == "hyper_parameters":
                checkpoint[_LEFT_OUT] = left_out


def say_what_is_not_plain(*owners: Any) -> list[str]:
    """Say of the hyperparameters of a module and its data which ones a checkpoint does not hold.

    Args:
        *owners: Objects with ``hparams``; others are passed over.

    Returns:
        What was said, for the notes of the run.
    """
    said: list[str] = []
    for owner in owners:
        _, left_out = _plain(getattr(owner, "hparams", {}))
        for name, value in left_out.items():
            text = (
                f"{name}={value} of {type(owner).__name__} is not a plain value, so that checkpoints do not hold it: "
                "give it again when one is loaded"
            )
            rank_zero_warn(text, category=GeoLoRAWarning)
            said.append(text)
    return said


def _plain(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Hyperparameters as plain values, and a description of those that have none."""
    kept: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name, value in values.items():
        try:
            kept[name] = _plain_value(value)
        except TypeError:
            left_out[name] = " ".join(repr(value).split())[:100]
    return kept, left_out


def _plain_value(value: Any) -> Any:
    """A value as numbers, names, tensors and what holds them: a path as its name, and numpy's numbers as Python's.

    Raises:
        TypeError: It has no such form.
    """
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (np.generic, np.ndarray)):
        if isinstance(inner := value.tolist(), np.generic):  # a longdouble stays what it is
            raise TypeError(f"{value.dtype} has no number of Python's")
        return _plain_value(inner)
    if isinstance(value, Mapping):
        return {_plain_value(key): _plain_value(inner) for key, inner in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(map(_plain_value, value))
    if value is None or type(value) in (bool, int, float, complex, str, bytes, *_OF_TORCH):
        return value
    raise TypeError(f"{type(value).__name__} is not plain")


def hyperparameters_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says about its module, without Lightning's own notes on the class and on what makes it.

    Raises:
        ValueError: It is not a mapping of names to values.
    """
    given = checkpoint.get("hyper_parameters", {})
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise ValueError(
            "the checkpoint's hyper_parameters are not values by name: it was changed, or is of another kind"
        )
    return {name: value for name, value in given.items() if not name.startswith("_")}


def refuse_missing(refused: Mapping[str, str], given: Iterable[str]) -> None:
    """Refuse a checkpoint that says what the user must say.

    Args:
        refused: Arguments that the checkpoint may not give, with the reasons.
        given: The names of the arguments that the user gave.

    Raises:
        ValueError: An argument is in the first and not in the second.
    """
    for name in refused.keys() - set(given):
        raise ValueError(
            f"{name} of the checkpoint is not taken from a file: it {refused[name]}. If you trust it, say so yourself: "
            f"give the run's configuration (--config), or {name}=... to load_from_checkpoint"
        )


def check_plain(value: object) -> None:
    """Refuse a value that names code to run.

    Raises:
        ValueError: There is such a key in it.
    """
    for key, inner in _entries(value):
        if key in _BUILDS and inner:
            raise ValueError(f"has {key}={inner!r}, which names code to run")


def check_sizes(value: object, never: Iterable[str] = ()) -> None:
    """Refuse settings of a model that are more than its sizes.

    Args:
        value: The settings, nested as they are.
        never: Names of settings that may not be set at all.

    Raises:
        ValueError: A setting names code or a place, is private, or is one of ``never``.
    """
    check_plain(value)
    for key, inner in _entries(value):
        if (key in never or key.startswith("_")) and inner:
            raise ValueError(f"has {key}={inner!r}, which is not a size of a model")
        if isinstance(inner, str) and _LOCATES.search(inner):
            raise ValueError(f"has {key}={inner!r}, which names a place to load from")


def _entries(value: object, key: str = "") -> Iterable[tuple[str, object]]:
    """Every key with its value, at every depth; what lies in a list has the key of the list."""
    yield key, value
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _entries(inner, str(name))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _entries(inner, key)


def _taker(module_class: type, of_package: bool) -> Callable[[str], bool]:
    """Say whether a class takes an argument that is a value.

    A constructor hands on to that of its base what it takes as ``**kwargs``, and may read it itself. One without them
    gives its base values of its own, which a checkpoint holds as well.

    Args:
        module_class: The class.
        of_package: Whether only arguments count that classes of this package have.
    """
    ours: set[str] = set()
    taken: set[str] = set()
    hands_on, takes_any = True, False
    for base in module_class.__mro__:
        package = base.__module__.partition(".")[0]
        if "__init__" not in vars(base) or package in _FOREIGN:
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        names = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)} - {"self"}
        if package == "geolora_pl":
            ours |= names
        if hands_on:
            taken |= names
            hands_on = any(p.kind is p.VAR_KEYWORD for p in parameters)
            takes_any |= hands_on and package != "geolora_pl"
    if of_package:
        return (taken & ours).__contains__
    return lambda name: name in taken or (takes_any and name not in ours)
