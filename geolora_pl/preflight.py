"""What is checked before a run begins: the checkpoint it starts from, the trainer's settings, the test it ends with."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden

_BROKEN = (EOFError, RuntimeError, ValueError, LookupError, pickle.UnpicklingError, zipfile.BadZipFile)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of a run, whole and unbroken, or say why it is none.

    Every byte is compared with the checksums in the file, for torch loads changed weights without a word.

    Args:
        path: The file.

    Returns:
        What is in it, mapped into memory on the CPU.

    Raises:
        ValueError: There is no such file, it is cut short or changed, or it holds something else than a run.
    """
    path = Path(path)
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no file"
        raise ValueError(f"ckpt_path={str(path)!r} is {kind} (from {Path.cwd()}): name the .ckpt file of a run")
    try:
        checkpoint = _load(path)
    except OSError as error:
        raise ValueError(
            f"ckpt_path={str(path)!r} cannot be opened ({error.strerror}): mend its permissions"
        ) from error
    except _BROKEN as error:
        raise ValueError(
            f"ckpt_path={str(path)!r} cannot be read: it is cut short, changed, or no checkpoint at all; go back to an "
            "earlier .ckpt file of the run"
        ) from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "pytorch-lightning_version"} <= checkpoint.keys():
        names = list(checkpoint)[:3] if isinstance(checkpoint, dict) else [type(checkpoint).__name__]
        raise ValueError(
            f"ckpt_path={str(path)!r} holds {', '.join(map(str, names)) or 'nothing'} and is no checkpoint of a run: "
            "name a .ckpt file that the trainer saved"
        )
    return checkpoint


def _load(path: Path) -> object:
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):  # all that torch has written since 1.6 are
            raise zipfile.BadZipFile
        with zipfile.ZipFile(file) as archive:
            if archive.testzip() is not None:
                raise zipfile.BadZipFile
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def check_trainer(trainer: L.Trainer) -> None:
    """Refuse what Lightning takes and cannot mean.

    Raises:
        ValueError: A number of steps or epochs of the trainer leaves nothing to train, or a bound is negative.
    """
    if trainer.accumulate_grad_batches < 1:
        raise ValueError(f"accumulate_grad_batches={trainer.accumulate_grad_batches} must be at least 1")
    if (clip := trainer.gradient_clip_val) is not None and not clip >= 0:
        raise ValueError(f"gradient_clip_val={clip} must be at least 0: a negative norm turns gradients around")
    if trainer.val_check_interval == 0:
        raise ValueError("val_check_interval=0 must be above 0: use limit_val_batches=0 for no validation")
    for name in ("max_epochs", "max_steps", "limit_train_batches"):
        if getattr(trainer, name) == 0:
            raise ValueError(f"{name}=0 leaves nothing to train: raise it, or use validate or test")


class CheckTestSplit(L.Callback):
    """Refuse, before the first step, a fit that is to end with a test that there is nothing for."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look for a test step and a test split.

        Raises:
            ValueError: One is missing.
        """
        data = trainer.datamodule  # type: ignore[attr-defined]  # set by the data connector
        splits = getattr(data, "splits", None)  # of a data module of ours, which is set up by now
        remedy = "set test_after_fit to false"
        if not is_overridden("test_step", pl_module):
            raise ValueError(f"test_after_fit=true and {type(pl_module).__name__} has no test_step: {remedy}")
        if isinstance(splits, Mapping) and not any(split.partition("_")[0] == "test" for split in splits):
            raise ValueError(
                f"test_after_fit=true and {type(data).__name__} has no test split, it has {', '.join(splits)}: {remedy}"
            )
        if not is_overridden("test_dataloader", pl_module if data is None else data):
            source = type(pl_module if data is None else data).__name__
            raise ValueError(f"test_after_fit=true and {source} has no test_dataloader: {remedy}")
