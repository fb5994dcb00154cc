"""From the checkpoint of a run to its module, by the checkpoint alone or with the run's configuration."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, get_loader
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn

from geolora_pl.errors import GeoLoRAWarning, in_one_line
from geolora_pl.lazy import import_class
from geolora_pl.lightning.hyperparameters import from_checkpoint, hyperparameters_of
from geolora_pl.lightning.internals import classes_by_name
from geolora_pl.lightning.module import GeoLoRAModule
from geolora_pl.lightning.names import path_of
from geolora_pl.storage.checkpoint import loads, read_checkpoint

_TASKS = "geolora_pl.tasks"  # the classes that a checkpoint may name by itself


def load_module(path: str | Path, config: str | Path | None = None) -> GeoLoRAModule:
    """Build the module of a checkpoint and load it.

    Without a configuration a task of this package is built from the numbers and names in the checkpoint. A class of
    somebody else, a name on a hub and an address are taken from the configuration alone, which is the user's own.

    Args:
        path: The checkpoint.
        config: The run's configuration, with ``model.class_path``; needed for a module that is not one of this package,
            for a small checkpoint, and for a checkpoint of a run that was started from Python.

    Raises:
        ValueError: The file is broken, the class is unknown, or they do not fit together.
    """
    checkpoint = read_checkpoint(path)
    settings = {} if config is None else _configured(config)
    module_class = _task_of(checkpoint, path) if config is None else _module_class(settings["class_path"])
    with loads(path, module_class.__name__):
        if config is None:
            module = module_class.from_content(checkpoint)
        else:
            taken, _ = from_checkpoint(module_class, checkpoint, configured=True)
            module = build_module(settings, taken)
            module.restore(checkpoint)
    module.eval()
    return module


def model_of(module: GeoLoRAModule) -> nn.Module:
    """The model of a module, which others load; a warning names what was trained beside it, in the module itself."""
    within = {id(parameter) for parameter in module.model.parameters()}
    if beside := [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in within]:
        warnings.warn(
            f"{beside[0]} was trained beside the model of {type(module).__name__} ({len(beside)} such parameters) and "
            "is left out: put what the model needs into what build_model returns",
            GeoLoRAWarning,
            stacklevel=3,
        )
    return module.model


def build_module(settings: Mapping[str, Any], taken: Mapping[str, Any]) -> GeoLoRAModule:
    """The module that the user's settings describe, completed by what a checkpoint may say.

    The parser sees the user's settings alone, because it imports whatever it can read as the name of a class.

    Args:
        settings: ``class_path`` and ``init_args``.
        taken: Arguments from :func:`from_checkpoint`, which count more.
    """
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(GeoLoRAModule, "module", fail_untyped=False, required=True, instantiate=False)
    try:
        with classes_by_name(path_of):  # as fit takes them
            parsed = parser.instantiate(parser.parse_object({"module": dict(settings)})).module
    except ArgumentError as error:
        raise ValueError(f"the configuration of the model: {in_one_line(error)}") from error
    init_args = vars(parsed.init_args) if "init_args" in parsed else {}  # a class without arguments has none
    module: GeoLoRAModule = import_class(parsed.class_path)(
        **{**init_args, **(settings.get("dict_kwargs") or {}), **taken}
    )
    return module


def _task_of(checkpoint: dict[str, Any], path: str | Path) -> type[GeoLoRAModule]:
    """The task of this package that a checkpoint names."""
    hyperparameters_of(checkpoint)  # which refuses what is not even a mapping
    class_path = checkpoint.get("hyper_parameters", {}).get("_class_path")
    name = str(class_path).rpartition(".")[2]
    tasks = import_module(_TASKS)  # by its name: the folder lies above this one
    if not str(class_path).startswith(f"{_TASKS}.") or name not in tasks.__all__:
        what = (
            "does not name its module"
            if class_path is None
            else f"is of {class_path}, which is not a task of geolora_pl"
        )
        raise ValueError(f"ckpt_path={str(path)!r} {what}: give the run's configuration with --config")
    task: type[GeoLoRAModule] = getattr(tasks, name)
    return task


def _configured(config: str | Path) -> dict[str, Any]:
    """The path of a configuration's module, as ``class_path``, and the arguments that it is given, as ``init_args``."""
    try:
        text = Path(config).read_text(encoding="utf-8")
        settings = get_loader("yaml")(text)  # as fit reads it: YAML alone takes 1e-3 for a text
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config={str(config)!r} cannot be read: {in_one_line(error)}") from error
    model = settings.get("model") if isinstance(settings, dict) else None
    model = {"class_path": model} if isinstance(model, str) else model
    if not isinstance(model, dict) or not isinstance(model.get("class_path"), str):
        raise ValueError(f"config={str(config)!r} has no model.class_path: give the configuration of the run")
    given = {name: model[name] for name in ("init_args", "dict_kwargs") if model.get(name)}
    if any(not isinstance(value, dict) for value in given.values()):
        raise ValueError(f"config={str(config)!r}: model.init_args must be settings by name")
    class_path = model["class_path"]
    is_name = class_path in import_module(_TASKS).__all__  # of a task alone, as fit takes it
    return {**given, "class_path": f"{_TASKS}.{class_path}" if is_name else class_path}


def _module_class(class_path: str) -> type[GeoLoRAModule]:
    found = import_class(class_path)
    if not issubclass(found, GeoLoRAModule):
        raise ValueError(
            f"class_path={class_path!r} is not a GeoLoRAModule: save its adapters from Python (save_adapter)"
        )
    return found
