"""Checkpoint files: whole or not there at all, and small where the base can be had elsewhere."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from torch import nn

from geolora_pl.fingerprint import base_hash, base_parameters, trained_names

_MARK = "geolora_base"  # in a small checkpoint: what is known of the base that it leaves out


class WholeFiles(TorchCheckpointIO):
    """Lightning's checkpoint files, written to a temporary name beside the target, flushed and renamed.

    A process that dies in mid-write leaves the earlier file as it was. (Lightning's own writes to the system's
    temporary folder, and where that is another disk, the file is copied in place.) Remote paths are left to Lightning.

    Args:
        module: Rebuilds the base of a small checkpoint that is loaded.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            OSError: It cannot be written; the target is as it was.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.part")  # what a process that died left there is written over
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, (OSError, RuntimeError)):  # torch's writer tells of a full disk by a RuntimeError
                raise OSError(
                    f"{target} cannot be written ({error}): free space or choose another folder; what was there before "
                    "is as it was"
                ) from error
            raise

    def load_checkpoint(
        self, path: _PATH, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, and complete a small one.

        Raises:
            ValueError: The file is no whole checkpoint, or its base is another one.
        """
        try:
            checkpoint = super().load_checkpoint(path, map_location, weights_only)
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # what torch raises for a damaged file depends on where it ends
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(
                f"{path} is no checkpoint that can be read ({reason}): it is damaged or something else; go back to an "
                "earlier one"
            ) from error
        complete(checkpoint, self._module)
        return checkpoint


def describe_base(module: nn.Module) -> dict[str, Any]:
    """What a small checkpoint says of the base: its hash, and the names of what is trained besides the adapters."""
    trained = trained_names(module)
    return {"hash": base_hash(module, trained), "trained": trained}


def shrink(checkpoint: dict[str, Any], module: nn.Module, base: dict[str, Any]) -> None:
    """Leave the frozen weights of the base out of a checkpoint, in place.

    Args:
        checkpoint: Lightning's, with the whole ``state_dict``.
        module: The module that it is of.
        base: From :func:`describe_base`.
    """
    left_out = _frozen_names(module, base["trained"])
    checkpoint["state_dict"] = {name: v for name, v in checkpoint["state_dict"].items() if name not in left_out}
    checkpoint[_MARK] = base


def complete(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Put the weights of the module's own base into a small checkpoint, in place; a whole one stays as it is.

    Args:
        checkpoint: Lightning's.
        module: With its adapters in, and the base that the checkpoint was made with.

    Raises:
        ValueError: The base is another one.
    """
    base = checkpoint.pop(_MARK, None)
    if base is None:
        return
    if base_hash(module, base["trained"]) != base["hash"]:
        raise ValueError(
            "the checkpoint holds the trained weights alone, and this base is not the one that they were trained on "
            "(its weights have another hash): load the same pretrained weights"
        )
    frozen = _frozen_names(module, base["trained"])
    of_base = {name: value for name, value in module.state_dict().items() if name in frozen}
    checkpoint["state_dict"] = of_base | checkpoint["state_dict"]


def _frozen_names(module: nn.Module, trained: Collection[str]) -> set[str]:
    """Every name that a frozen weight of the base has in a ``state_dict``."""
    frozen = {id(parameter) for name, parameter in base_parameters(module).items() if name not in trained}
    return {name for name, p in module.named_parameters(remove_duplicate=False) if id(p) in frozen}
