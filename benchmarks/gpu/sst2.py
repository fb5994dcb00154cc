"""One training of MiniLM on the whole of SST-2 with this package's defaults, from what ``carried.py`` has written.

python benchmarks/gpu/sst2.py --folder build/gpu
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is found from where this script lies

import argparse
import time
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from benchmarks.shared import results
from benchmarks.shared.results import Record
from geolora_pl import GeoLoRACallback
from geolora_pl.data.texts.sampler import ShuffledSampler
from geolora_pl.tasks import TextClassification

MODEL_FOLDER = "minilm"
TOKENS_FILE = "sst2.safetensors"


class Tokens(L.LightningDataModule):
    """The texts of SST-2 as token ids in memory, in batches of similar length.

    Args:
        path: The file that ``carried.py`` has written.
        batch_size: Texts per step.
    """

    num_classes = 2
    metrics = ("accuracy",)

    def __init__(self, path: Path, batch_size: int) -> None:
        super().__init__()
        self.tensors = load_file(path)
        self.batch_size = batch_size

    def _loader(self, split: str) -> DataLoader[Any]:
        lengths = self.tensors[f"{split}.lengths"].tolist()
        ids = self.tensors[f"{split}.ids"].long().split(lengths)
        samples = list(zip(ids, self.tensors[f"{split}.labels"].long(), strict=True))
        sampler = ShuffledSampler(samples, self.batch_size, lengths) if split == "train" else None  # type: ignore[arg-type]  # sized
        return DataLoader(
            samples,  # type: ignore[arg-type]  # a list is a data set
            self.batch_size,
            sampler=sampler,
            collate_fn=padded,
            pin_memory=torch.cuda.is_available(),
        )

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val")


def padded(samples: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """A batch of token ids, filled up with zeros, as BERTs pad."""
    ids, labels = zip(*samples, strict=True)
    words = pad_sequence(ids, batch_first=True)
    return {"input_ids": words, "attention_mask": (words != 0).long(), "labels": torch.stack(labels)}


class Found(L.Callback):
    """Writes what is known after every epoch, so that a run that is cut short leaves something.

    Args:
        callback: The callback that adapts.
        about: What else to write.
        command: The command that started the run.
    """

    def __init__(self, callback: GeoLoRACallback, about: Record, command: str) -> None:
        self.callback, self.about, self.command = callback, about, command
        self.epochs: list[Record] = []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.start = time.perf_counter()

    def on_validation_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        logged = {name: value for name, value in trainer.callback_metrics.items() if not name.startswith("rank/")}
        measured = {name: value.item() for name, value in logged.items()}  # waits for the device
        self.epochs.append({"steps": trainer.global_step, "seconds": time.perf_counter() - self.start, **measured})
        integrator = self.callback.integrator
        assert integrator is not None
        last = {
            "parameters": integrator.adapter_parameters(),
            "ranks": list(integrator.ranks().values()),
            "adaptations": integrator.adaptations,
            "skipped_steps": integrator.skipped_steps,
            "peak_mb": torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else None,
        }
        results.write(f"sst2_{self.about['device']}", self.command, {**self.about, "epochs": self.epochs, **last})


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="what carried.py has written")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="bf16-mixed", help="as for Lightning's Trainer")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batches", type=int, help="the most batches of an epoch; by default all")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else list(arguments)
    args = make_parser().parse_args(given)
    about = {name: getattr(args, name) for name in ("device", "precision", "batch_size")}
    callback = GeoLoRACallback()
    found = Found(callback, about, " ".join(["python benchmarks/gpu/sst2.py", *given]))
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        accelerator=args.device,
        devices=1,
        precision=args.precision,
        max_epochs=args.epochs,
        limit_train_batches=args.batches,
        limit_val_batches=args.batches,
        callbacks=[callback, found],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(
        TextClassification(str(args.folder / MODEL_FOLDER)),
        datamodule=Tokens(args.folder / TOKENS_FILE, args.batch_size),
    )


if __name__ == "__main__":
    main()
