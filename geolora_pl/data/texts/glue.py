"""Read the nine tasks of GLUE, from the official files or from the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import datasets
import pyarrow as pa

from geolora_pl.data.texts.hub import fetch
from geolora_pl.data.texts.labelled import TextDataModule
from geolora_pl.data.texts.labels import to_dataset
from geolora_pl.data.texts.tables import read_delimited

Task = Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"]
_HUB = "nyu-mll/glue"


@dataclass(frozen=True)
class _Source:
    """The layout of a task in the official files and on the hub.

    Attributes:
        folder: The name of the folder.
        texts: The columns of the texts in the files.
        label: The column of the label in the files; on the hub it is always ``label``.
        classes: The name of the class by label in the files, in the order of the indices; none for a regression.
        metrics: The metrics that GLUE reports.
        hub_texts: The columns of the texts on the hub.
        header: The columns of ``train`` and ``dev``, if these files have no header line.
        splits: The files by our splits; on the hub ``dev`` is called ``validation``.
    """

    folder: str
    texts: tuple[str, ...]
    label: str
    classes: Mapping[str, str]
    metrics: tuple[str, ...] = ("accuracy",)
    hub_texts: tuple[str, ...] = ("sentence1", "sentence2")
    header: tuple[str, ...] = ()
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "val": "dev", "predict": "test"})


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_SOURCES: dict[str, _Source] = {
    "cola": _Source(
        "CoLA",
        ("sentence",),
        "label",
        {"0": "unacceptable", "1": "acceptable"},
        ("matthews",),
        hub_texts=("sentence",),
        header=("source", "label", "mark", "sentence"),
    ),
    "sst2": _Source("SST-2", ("sentence",), "label", {"0": "negative", "1": "positive"}, hub_texts=("sentence",)),
    "mrpc": _Source(
        "MRPC",
        ("#1 String", "#2 String"),
        "Quality",
        {"0": "not_equivalent", "1": "equivalent"},
        ("f1", "accuracy"),
    ),
    "qqp": _Source(
        "QQP",
        ("question1", "question2"),
        "is_duplicate",
        {"0": "not_duplicate", "1": "duplicate"},
        ("f1", "accuracy"),
        hub_texts=("question1", "question2"),
    ),
    "stsb": _Source("STS-B", ("sentence1", "sentence2"), "score", {}, ("pearson", "spearman")),
    "mnli": _Source(
        "MNLI",
        ("sentence1", "sentence2"),
        "gold_label",
        _same("entailment", "neutral", "contradiction"),
        hub_texts=("premise", "hypothesis"),
        splits={
            "train": "train",
            "val": "dev_matched",
            "val_mismatched": "dev_mismatched",
            "predict": "test_matched",
            "predict_mismatched": "test_mismatched",
        },
    ),
    "qnli": _Source(
        "QNLI",
        ("question", "sentence"),
        "label",
        _same("entailment", "not_entailment"),
        hub_texts=("question", "sentence"),
    ),
    "rte": _Source("RTE", ("sentence1", "sentence2"), "label", _same("entailment", "not_entailment")),
    "wnli": _Source("WNLI", ("sentence1", "sentence2"), "label", {"0": "not_entailment", "1": "entailment"}),
}


class GLUE(TextDataModule):
    """A task of GLUE (Wang et al., ICLR 2019) with its metrics.

    The development set is the validation set. MNLI has two: the matched one, and the mismatched one, whose logged names
    end with ``_mismatched``. The test sets have no labels and are only for ``predict``.

    Lines of the official files with too few or too many fields (a few in QQP) are left out; a message says how many.

    Args:
        task: One of ``cola``, ``sst2``, ``mrpc``, ``qqp``, ``stsb``, ``mnli``, ``qnli``, ``rte`` and ``wnli``.
        folder: The folder with the official files, ``CoLA/train.tsv`` and so on; by default they come from the hub
            (``nyu-mll/glue``).
        **kwargs: Arguments of :class:`TextDataModule`.

    Raises:
        ValueError: The task is unknown, the files do not exist, or there are files to train on and none to validate on.
    """

    def __init__(self, task: Task, folder: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if task not in _SOURCES:
            raise ValueError(f"task={task!r} must be one of {', '.join(_SOURCES)}")
        self.task = task
        self._source = _SOURCES[task]
        self.folder = None if folder is None else Path(folder) / self._source.folder
        if self.folder is not None:
            self._refuse_missing(self.folder)

    def _files(self, folder: Path) -> dict[str, Path]:
        return {split: folder / f"{file}.tsv" for split, file in self._source.splits.items()}

    def _refuse_missing(self, folder: Path) -> None:
        files = self._files(folder)
        absent = {split: path.name for split, path in files.items() if not path.is_file()}
        if len(absent) == len(files):
            raise ValueError(
                f"folder={str(folder.parent)!r} must hold {folder.name}/{' or '.join(absent.values())}; without "
                "folder, GLUE comes from the hub"
            )
        to_validate = [name for split, name in absent.items() if split.startswith("val")]
        if to_validate and "train" not in absent:
            raise ValueError(
                f"folder={str(folder.parent)!r} holds {folder.name}/train.tsv, so it must hold {to_validate[0]} as "
                "well, the set on which GLUE validates"
            )

    @property
    def class_names(self) -> list[str]:
        """The names on the hub, in its order; none for STS-B."""
        return list(self._source.classes.values())

    @property
    def metrics(self) -> list[str]:
        """The metrics that GLUE reports for the task."""
        return list(self._source.metrics)

    def load_splits(self) -> dict[str, datasets.Dataset]:
        """Read the files that exist, or fetch all splits from the hub."""
        if self.folder is None:
            return self._from_hub()
        return {split: self._read(split, path) for split, path in self._files(self.folder).items() if path.is_file()}

    def _read(self, split: str, path: Path) -> datasets.Dataset:
        unlabelled = split.startswith("predict")
        label = None if unlabelled else self._source.label
        table = read_delimited(
            path,
            [*self._source.texts, *([] if label is None else [label])],
            tab=True,
            header=() if unlabelled else self._source.header,
            skip_malformed=True,
        )
        return to_dataset(table, self._source.texts, label, self._source.classes, path)

    def _from_hub(self) -> dict[str, datasets.Dataset]:
        remedy = "name the folder of the official files"
        try:
            hub = fetch(_HUB, self.task)
        except ValueError as error:
            raise ValueError(f"folder=None: {error}; {remedy}") from error
        theirs = getattr(hub["train"].features["label"], "names", [])
        if theirs != self.class_names:
            raise ValueError(f"{_HUB} has the labels {theirs} for {self.task}, and not {self.class_names}: {remedy}")
        by_index = {str(index): name for index, name in enumerate(theirs)}
        splits: dict[str, datasets.Dataset] = {}
        for split, file in self._source.splits.items():
            name = file.replace("dev", "validation")
            table: pa.Table = hub[name].with_format("arrow")[:]
            label = None if split.startswith("predict") else "label"
            splits[split] = to_dataset(table, self._source.hub_texts, label, by_index, f"{_HUB} {name}")
        return splits

    def test_dataloader(self) -> NoReturn:
        """Refuse a test, because the test sets have no labels.

        Raises:
            ValueError: This is always raised.
        """
        raise ValueError(
            "the test sets of GLUE have no labels: use validate for the score on the development set, and predict for "
            "the test set"
        )
