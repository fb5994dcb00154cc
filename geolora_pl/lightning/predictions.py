"""Predictions to a file: labels and probabilities in the order of the inputs, whatever the number of processes."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import IterableDataset

from geolora_pl.errors import GeoLoRAWarning
from geolora_pl.storage.atomic import atomic
from geolora_pl.training.distributed import gathered

Row = dict[str, Any]
SUFFIXES = (".csv", ".jsonl")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # with which a spreadsheet begins a formula


class PredictionWriter(BasePredictionWriter):
    """Write what ``predict`` finds, one row per input, in the order of the inputs.

    A row has the index of the input, what the data module says of it in ``predict_inputs`` (the name of an image's
    file, a text), and the label with the probability of every class (in CSV as columns ``p_<class>``), or the number
    in a regression; or, where ``predict_step`` returns a mapping per input, such as tags or an answer, what that says.
    A module with ``multi_label`` gets ``labels``, those of a probability of one half and more; in CSV ``|`` stands
    between them. Label and numbers are empty where they are not finite, which a warning says. The classes are named by
    the module's ``class_names``, else by the data's, else by their index. In CSV, a text that a spreadsheet would run
    as a formula gets an apostrophe before it, and other lists and mappings are as in JSON; JSON lines are exact.

    Args:
        output: The file, ``.csv`` or ``.jsonl``, replaced if it is there; ``None`` to keep the rows in memory.

    Attributes:
        rows: The rows of the last prediction, in the main process.

    Raises:
        ValueError: The file's ending is another, or ``predict_step`` gives no probabilities.

    Example:
        >>> trainer = L.Trainer(callbacks=PredictionWriter("predictions.csv"), logger=False)
    """

    def __init__(self, output: str | Path | None) -> None:
        super().__init__(write_interval="epoch")
        self.output = None if output is None else Path(output)
        if self.output is not None and self.output.suffix not in SUFFIXES:
            raise ValueError(f"output={str(output)!r} must end in {' or '.join(SUFFIXES)}")
        self.rows: list[Row] = []

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse, before the work, what the predictions could not be written with.

        Raises:
            ValueError: The file cannot be made, two classes have the same name, or the inputs have no numbers.
        """
        names = _names(pl_module, getattr(trainer, "datamodule", None))
        if len(set(names)) < len(names):
            raise ValueError(f"class_names={list(names)} must differ: their probabilities could not be told apart")
        for loader in CombinedLoader(trainer.predict_dataloaders).flattened:
            data = getattr(loader, "dataset", None)
            if getattr(loader, "batch_sampler", None) is None or isinstance(data, IterableDataset):
                raise ValueError(
                    f"predict_dataloader gives {type(loader).__name__} of {type(data).__name__}, whose inputs have no "
                    "numbers by which predictions are put in order: give a DataLoader with a batch_size, of a Dataset "
                    "with a length"
                )
        if self.output is not None:
            above = next(folder for folder in self.output.absolute().parents if folder.exists())
            if self.output.is_dir() or not above.is_dir() or not os.access(above, os.W_OK):
                raise ValueError(f"output={str(self.output)!r} cannot be written: name a file in a folder of yours")

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Refuse at the first batch, and not after the work, what cannot be written.

        Raises:
            ValueError: ``predict_step`` gives something else than is written, or the names are not those of its
                classes.
        """
        batches = trainer.predict_loop.epoch_batch_indices
        if len(indices := batches[dataloader_idx]) > 1:
            return
        predictions = _of_inputs(outputs, len(indices[0]), pl_module)
        found = {(dataloader_idx, index): each for index, each in zip(indices[0], predictions, strict=True)}
        rows = _rows(found, pl_module, getattr(trainer, "datamodule", None), len(batches))
        if self.output is not None:
            try:
                _write_rows(rows, io.StringIO(), self.output.suffix)
            except TypeError as error:
                raise ValueError(
                    f"{type(pl_module).__name__}.predict_step must return what JSON holds, such as texts, numbers and "
                    f"lists, for output={str(self.output)!r}: {error}"
                ) from error

    def write_on_epoch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Gather the predictions of all processes and write them."""
        by_set = predictions if len(batch_indices) > 1 else [predictions]
        mine: dict[tuple[int, int], Tensor | Row] = {}
        for number, (batches, indices_of_batches) in enumerate(zip(by_set, batch_indices, strict=True)):
            for batch, indices in zip(batches, indices_of_batches, strict=True):
                for index, prediction in zip(indices, _of_inputs(batch, len(indices), pl_module), strict=True):
                    mine[number, index] = prediction
        everything = gathered(mine)
        if trainer.is_global_zero:
            found = {key: prediction for of_process in everything for key, prediction in of_process.items()}
            if broken := sum(not _is_finite(prediction) for prediction in found.values()):
                rank_zero_warn(
                    f"{broken} of {len(found)} predictions are not finite, so their label or number is left empty: "
                    "look at the inputs and at the checkpoint",
                    category=GeoLoRAWarning,
                )
            self.rows = _rows(found, pl_module, getattr(trainer, "datamodule", None), len(by_set))
            if self.output is not None:
                _write(self.rows, self.output)


def writer_for(module: object, output: str | Path | None) -> Any:
    """The callback that writes what a module predicts: the module's own ``prediction_writer``, or one for tables.

    Args:
        module: A LightningModule.
        output: What is written.
    """
    return getattr(module, "prediction_writer", PredictionWriter)(output)


def predict(
    module: L.LightningModule, data: L.LightningDataModule, output: str | Path | None = None, **trainer: Any
) -> list[Row]:
    """Predict what a data module gives, in one process.

    Args:
        module: A trained module, as from ``ImageClassification.load_from_checkpoint("last.ckpt")``.
        data: Such as ``UnlabelledImages("folder")`` or ``UnlabelledTexts("texts.txt")`` of ``geolora_pl.data``.
        output: A file to write as well, ``.csv`` or ``.jsonl``; a folder for a module that draws images.
        **trainer: Arguments of ``lightning.Trainer``, such as ``accelerator`` or ``precision``.

    Returns:
        The rows of :class:`PredictionWriter`, in the order of the inputs.

    Raises:
        ValueError: As of :class:`PredictionWriter`.
    """
    writer = writer_for(module, output)
    settings = {"logger": False, "devices": 1, "enable_checkpointing": False, **trainer}
    L.Trainer(callbacks=writer, **settings).predict(module, datamodule=data, return_predictions=False)
    rows: list[Row] = writer.rows
    return rows


def _of_inputs(batch: object, number: int, module: object) -> Sequence[Any]:
    """What is predicted for each of a number of inputs: a tensor or a mapping.

    Raises:
        ValueError: It is neither, or not of so many inputs.
    """
    of_inputs: Sequence[Any] = ()
    if isinstance(batch, Tensor) and batch.dim() in (1, 2):
        of_inputs = list(batch.detach().float().cpu())
    elif isinstance(batch, list) and all(isinstance(row, dict) for row in batch):
        of_inputs = _plain(batch)
    if len(of_inputs) != number:
        raise ValueError(
            f"{type(module).__name__}.predict_step must return probabilities (batch, classes), numbers (batch,) or one "
            "mapping per input for the predictions to be written"
        )
    return of_inputs


def _plain(value: Any) -> Any:
    """A value with numbers and lists in the place of tensors and arrays, which no file holds."""
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return {name: _plain(inner) for name, inner in value.items()} if isinstance(value, dict) else value


def _rows(found: dict[tuple[int, int], Tensor | Row], module: object, data: object, sets: int) -> list[Row]:
    names = _names(module, data)
    inputs: dict[str, list[Any]] = (getattr(data, "predict_inputs", None) or {}) if sets == 1 else {}
    rows = []
    for (number, index), prediction in sorted(found.items(), key=lambda item: item[0]):
        row: Row = ({"set": number} if sets > 1 else {}) | {"index": index}
        row |= {column: _finite(values[index]) for column, values in inputs.items()}
        if isinstance(prediction, dict):
            rows.append(row | _finite(prediction))
            continue
        if prediction.dim() == 0:
            rows.append(row | {"prediction": _finite(prediction.item())})
            continue
        probabilities = [_finite(value) for value in prediction.tolist()]
        if names and len(names) != len(probabilities):
            raise ValueError(f"class_names={list(names)} must name the {len(probabilities)} classes of the predictions")
        of_class = dict(zip(names or map(str, range(len(probabilities))), probabilities, strict=True))
        rows.append(row | _found(of_class, bool(getattr(module, "multi_label", False))) | {"probabilities": of_class})
    return rows


def _found(of_class: dict[str, float | None], multi_label: bool) -> Row:
    """The label of the highest probability, or all of one half and more; empty where a probability is not finite."""
    known = {name: probability for name, probability in of_class.items() if probability is not None}
    whole = len(known) == len(of_class)
    if multi_label:
        return {"labels": [name for name, probability in known.items() if probability >= 0.5] if whole else None}
    return {"label": max(known, key=lambda name: known[name]) if whole else None}


def _is_finite(prediction: Tensor | Row) -> bool:
    return bool(prediction.isfinite().all()) if isinstance(prediction, Tensor) else _finite(prediction) == prediction


def _finite(value: Any) -> Any:
    """A value in which nothing is left of numbers that are not finite, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return {name: _finite(inner) for name, inner in value.items()} if isinstance(value, dict) else value


def _names(module: object, data: object) -> Sequence[str]:
    return getattr(module, "class_names", None) or getattr(data, "class_names", None) or ()


def _write(rows: list[Row], output: Path) -> None:
    # The name of a file may hold bytes that are not text; they are written as escapes, such as \\udce9.
    settings: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
    with atomic(output) as unfinished, unfinished.open("w", **settings) as file:
        _write_rows(rows, file, output.suffix)


def _write_rows(rows: list[Row], file: TextIO, suffix: str) -> None:
    if suffix == ".jsonl":
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        return
    flat = [_flat(row) for row in rows]
    writer = csv.DictWriter(file, list(dict.fromkeys(column for row in flat for column in row)))
    writer.writeheader()
    writer.writerows(flat)


def _flat(row: Row) -> Row:
    probabilities: dict[str, float] = row.get("probabilities", {})
    single = {column: value for column, value in row.items() if column != "probabilities"}
    if isinstance(labels := single.get("labels"), list):
        single["labels"] = "|".join(map(str, labels))
    return {_harmless(k): _harmless(v) for k, v in (single | {f"p_{n}": p for n, p in probabilities.items()}).items()}


def _harmless(cell: Any) -> Any:
    """A cell of a CSV file that no spreadsheet runs: a text that looks like a formula gets an apostrophe before it.

    A list or a mapping is written as in JSON, which begins with a bracket.

    OWASP names the signs; a text that is a number, such as the class -1, is not a formula.
    """
    if isinstance(cell, (list, dict)):
        return json.dumps(cell, ensure_ascii=False)
    if not isinstance(cell, str) or not cell.startswith(_FORMULA):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell
