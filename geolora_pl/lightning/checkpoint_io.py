"""Checkpoint files of Lightning, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from torch import nn

from geolora_pl.lightning.internals import PathLike
from geolora_pl.storage.atomic import atomic
from geolora_pl.storage.checkpoint import check_probes, complete, found, read_checkpoint

_PATHS = ("last_model_path", "best_model_path", "kth_best_model_path")  # in the state of a ModelCheckpoint


class WholeFiles(TorchCheckpointIO):
    """Lightning's checkpoint files, written to a temporary name beside the target, flushed and renamed.

    A process that dies while it writes leaves the earlier file as it was, and a hidden folder ``.<file>.*`` beside it
    that may be deleted. (Lightning writes to the system's temporary folder, and where that is another disk, it copies
    the file into place.) Remote paths are left to Lightning.

    Args:
        module: The module from which a small checkpoint that is loaded gets its base.
        describe: Called with a checkpoint that holds weights alone, of which Lightning asks no callback, before it is
            written.
        resumes: Whether a fit goes on from a checkpoint that is loaded, which takes more than its weights.
    """

    def __init__(
        self, module: nn.Module, describe: Callable[[dict[str, Any]], None] | None = None, resumes: bool = False
    ) -> None:
        self._module = module
        self._describe = describe
        self._resumes = resumes

    def save_checkpoint(self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        A link in its place is replaced, as by Lightning: ``last.ckpt`` may be one to the best checkpoint.

        Raises:
            OSError: It cannot be written; the target is as it was.
        """
        # A process that was forked also writes here, to send its weights back: those are no checkpoint.
        if self._describe is not None and "state_dict" in checkpoint and "callbacks" not in checkpoint:
            self._describe(checkpoint)
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        try:
            with atomic(target, follow=False) as unfinished, unfinished.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # Torch's own writer tells of a full disk by a RuntimeError, alone or on the way out of an OSError.
            of_disk = next((e for e in (error, error.__context__) if isinstance(e, OSError)), None)
            if of_disk or "PytorchStreamWriter" in str(error):
                raise OSError(
                    f"{target} cannot be written ({of_disk or error}): free space or choose another folder; what was "
                    "there before is as it was"
                ) from error
            raise

    def load_checkpoint(
        self, path: PathLike, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, and complete a small one.

        Raises:
            ValueError: The file is not a whole checkpoint, it belongs to another base, or a fit cannot go on from it.
        """
        if weights_only is False:  # the user says so: Lightning itself gives None here, for an address as well
            with found(path) as file:
                checkpoint: dict[str, Any] = torch.load(file, map_location=map_location or "cpu", weights_only=False)
        else:
            checkpoint = read_checkpoint(path)
        if self._resumes:
            check_probes(checkpoint, self._module)
        complete(checkpoint, self._module)
        return checkpoint


def forget_other_files(checkpoint: Mapping[str, Any], callbacks: Iterable[Checkpoint]) -> None:
    """Keep callbacks that are resumed from removing files that do not lie in their own folders.

    They remove older checkpoints, whose paths they take from the file without following ``..`` in them. A callback that
    the file leads elsewhere begins anew.

    Args:
        checkpoint: The content of the file, which is changed in place.
        callbacks: The callbacks that save checkpoints.
    """
    states = checkpoint.get("callbacks", {})
    for callback in callbacks:
        state, folder = states.get(callback.state_key), str(getattr(callback, "dirpath", None))
        if not isinstance(state, dict):
            continue
        of_metric = state.get("best_k_models") or {}
        if any(path and not _lies_in(path, folder) for path in (*map(state.get, _PATHS), *of_metric)):
            state.update(dict.fromkeys(_PATHS, ""), best_k_models={})


def _lies_in(path: object, folder: str) -> bool:
    """Whether a path leads into a folder, or an address into that of a folder."""
    path = str(path)
    if "://" in path or "://" in folder:
        return path.startswith(f"{folder.rstrip('/')}/") and ".." not in path.split("/")
    return Path(os.path.abspath(folder)) in Path(os.path.abspath(path)).parents  # which follows ".."
