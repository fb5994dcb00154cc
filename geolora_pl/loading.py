"""From the checkpoint of a run to its module, with nothing but the checkpoint."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import yaml

from geolora_pl.checkpoints import read_checkpoint
from geolora_pl.module import GeoLoRAModule

_OURS = "geolora_pl."  # classes that a checkpoint may name by itself


def load_module(path: str | Path, config: str | Path | None = None) -> GeoLoRAModule:
    """Build the module of a checkpoint and load it.

    A checkpoint of the command line names the class of its module. It is believed if the class is one of
    ``geolora_pl``; code of others is imported only if the configuration names it, which is the user's own.

    Args:
        path: The checkpoint.
        config: The run's configuration, with ``model.class_path``; needed for a module that is none of ours, and for
            a checkpoint of a run that was started from Python.

    Raises:
        ValueError: The file is broken, the class is unknown, or they do not fit together.
    """
    checkpoint = read_checkpoint(path)
    class_path = checkpoint.get("hyper_parameters", {}).get("_class_path")
    if config is not None:
        class_path = _configured_class(config)
    elif not isinstance(class_path, str) or not class_path.startswith(_OURS):
        what = "does not name its module" if class_path is None else f"is of {class_path}, which is none of ours"
        raise ValueError(f"ckpt_path={str(path)!r} {what}: give the run's configuration with --config")
    home, _, name = class_path.rpartition(".")
    try:
        module_class = getattr(import_module(home), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"class_path={class_path!r} cannot be imported: {error}") from error
    if not (isinstance(module_class, type) and issubclass(module_class, GeoLoRAModule)):
        raise ValueError(f"class_path={class_path!r} is no GeoLoRAModule: save its adapters from Python (save_adapter)")
    try:
        module = module_class.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except (RuntimeError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"ckpt_path={str(path)!r} cannot be loaded as {class_path}: {reason}") from error
    module.eval()
    return module


def _configured_class(config: str | Path) -> str:
    try:
        settings = yaml.safe_load(Path(config).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"config={str(config)!r} cannot be read: {' '.join(str(error).split())}") from error
    model = settings.get("model") if isinstance(settings, dict) else None
    class_path = model.get("class_path") if isinstance(model, dict) else model
    if not isinstance(class_path, str):
        raise ValueError(f"config={str(config)!r} has no model.class_path: give the configuration of the run")
    return class_path
