"""Kill a run at random moments, resume it from its last whole checkpoint, and compare it with an unbroken run.

    python tools/kill_and_resume.py --kills 20

The run is the quickstart, started by its command line, with a checkpoint at every step, so that many kills interrupt
the writing of one. In the end weights, moments, ranks, schedule and random states must equal those of the unbroken run
to the bit.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from geolora_pl.cli.dispatch import main

ROOT = Path(__file__).parents[1]
OVERLAY = """
test_after_fit: false
trainer:
  enable_progress_bar: false
  logger: false
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args:
        {dirpath: checkpoints, every_n_train_steps: 1, save_last: true, save_top_k: 0, enable_version_counter: false}
    - class_path: kill_and_resume.SaveTheEnd
"""
CHECKPOINT, END = Path("checkpoints/last.ckpt"), Path("end.ckpt")


class SaveTheEnd(Callback):
    """Writes a checkpoint at the very end, because the step of a run's last one depends on whether it was resumed."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the checkpoint."""
        trainer.save_checkpoint(END)


def run(folder: Path, epochs: int) -> None:
    """Fit in a folder, and start from its last checkpoint if there is one."""
    os.chdir(folder)
    (folder / "overlay.yaml").write_text(OVERLAY)
    log = os.open("log.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    arguments = ["fit", "--config", "configs/quickstart.yaml", "--config", "overlay.yaml"]
    resumed = ["--ckpt_path", str(CHECKPOINT)] if CHECKPOINT.exists() else []
    main([*arguments, "--trainer.max_epochs", str(epochs), *resumed])


def start(folder: Path, epochs: int) -> multiprocessing.Process:
    """Start :func:`run` in a forked process, which need not import anything again."""
    folder.mkdir(exist_ok=True)
    if not (folder / "configs").exists():
        (folder / "configs").symlink_to(ROOT / "configs")
    process = multiprocessing.get_context("fork").Process(target=run, args=(folder, epochs))
    process.start()
    return process


def finish(folder: Path, epochs: int) -> dict[str, Any]:
    """Let a run come to its end, and read its last checkpoint."""
    process = start(folder, epochs)
    process.join()
    if process.exitcode:
        sys.exit(f"the run failed:\n{(folder / 'log.txt').read_text()[-3000:]}")
    return read(folder / END)


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint, which must be whole."""
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


def differences(ours: Any, theirs: Any, name: str = "") -> list[str]:
    """The names of all values that are not equal to the bit."""
    if isinstance(ours, dict):
        return [d for key in ours | theirs for d in differences(ours.get(key), theirs.get(key), f"{name}.{key}")]
    if isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)) and len(ours) == len(theirs):
        return [d for i, pair in enumerate(zip(ours, theirs, strict=True)) for d in differences(*pair, f"{name}.{i}")]
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        return [] if torch.equal(ours, theirs) else [name]
    return [] if ours == theirs else [name]


def soak(kills: int, epochs: int, seed: int) -> None:
    """Kill, resume and compare; exit with 1 if anything differs."""
    console, moments = Console(), random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        began = time.monotonic()
        whole = finish(Path(place, "whole"), epochs)
        seconds = time.monotonic() - began
        console.print(f"unbroken: {whole['global_step']} steps in {seconds:.0f} s")
        broken, done, while_writing = Path(place, "broken"), 0, 0
        while done < kills:
            process = start(broken, epochs)
            process.join(moments.uniform(0.1, 0.5) * seconds)
            if process.exitcode:
                sys.exit(f"the run failed:\n{(broken / 'log.txt').read_text()[-3000:]}")
            if not process.is_alive():  # it came to its end, so the next one begins at the start
                shutil.rmtree(broken / "checkpoints")
                continue
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            done += 1
            for unfinished in broken.glob("checkpoints/.*"):
                while_writing += 1
                shutil.rmtree(unfinished)
            step = read(broken / CHECKPOINT)["global_step"] if (broken / CHECKPOINT).exists() else 0
            console.print(f"kill {done}: the last whole checkpoint is of step {step}")
        resumed = finish(broken, epochs)
    compared = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "callbacks")
    different = [name for key in compared for name in differences(resumed[key], whole[key], key)]
    different = [name for name in different if "ModelCheckpoint" not in name]  # its paths differ
    console.print(
        f"{kills} kills, {while_writing} of them while a checkpoint was written; differences: {different or 0}"
    )
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    soak(given.kills, given.epochs, given.seed)
