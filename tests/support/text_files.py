"""Small files of texts, and a data module with its task."""

import json
from pathlib import Path

import lightning as L
import pyarrow as pa
import pyarrow.parquet as pq
from tiny_text import make_tokenizer

from geolora_pl.data import TextDataModule


def attach(data: TextDataModule, tokenizer=None) -> TextDataModule:
    """Give a data module a trainer whose module has a tokenizer."""

    class Wants(L.LightningModule):
        pass

    Wants.tokenizer = tokenizer or make_tokenizer(model_max_length=16)
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(Wants())
    data.trainer = trainer
    data.setup("fit")
    return data


def write_rows(path: Path, rows) -> str:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write(path: Path, **columns) -> str:
    names, rows = list(columns), list(zip(*columns.values(), strict=True))
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif path.suffix == ".jsonl":
        write_rows(path, [dict(zip(names, row, strict=True)) for row in rows])
    elif path.suffix == ".tsv":
        path.write_text("".join("\t".join(map(str, row)) + "\n" for row in [names, *rows]))
    else:
        quoted = [[f'"{str(cell).replace(chr(34), chr(34) * 2)}"' for cell in row] for row in rows]
        path.write_text("".join(",".join(row) + "\n" for row in [names, *quoted]))
    return str(path)
