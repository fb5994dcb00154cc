"""What a machine without a network needs for ``sst2.py``, as small files: MiniLM's weights in float16, SST-2 in tokens.

python benchmarks/gpu/carried.py --folder build/gpu
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is found from where this script lies

import argparse
import shutil
from collections.abc import Sequence

import torch
from safetensors.torch import load_file, save_file

from benchmarks.gpu.sst2 import MODEL_FOLDER, TOKENS_FILE
from benchmarks.shared import text_tasks
from benchmarks.shared.paths import GLUE_FOLDER
from geolora_pl.data import GLUE
from geolora_pl.tasks.text_models import find_source, load_config, load_tokenizer

WEIGHTS = "model.safetensors"
MAX_LENGTH = 64  # tokens; no text of SST-2 is longer
KEPT = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def halve(model: str, folder: Path) -> None:
    """Copy a model with its floating-point weights in float16.

    Args:
        model: A folder, or ``pkg://package/folder``.
        folder: Where to write it.
    """
    source = Path(find_source(model)[0])
    folder.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    weights = {name: w.half() if w.is_floating_point() else w for name, w in load_file(source / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def tokenize(model: str, glue: Path, path: Path) -> None:
    """Write the texts of SST-2 as token ids, their lengths and their labels.

    Args:
        model: Whose tokenizer it is.
        glue: Folder of GLUE in the official layout.
        path: The file to write.
    """
    tokenizer = load_tokenizer(model, load_config(model, {}))
    tensors = {}
    splits = GLUE("sst2", str(glue)).load_splits()
    for split in ("train", "val"):
        texts = splits[split]
        rows = tokenizer(texts["text"][:], truncation=True, max_length=MAX_LENGTH)["input_ids"]
        tensors[f"{split}.ids"] = torch.tensor([token for row in rows for token in row], dtype=torch.int16)
        tensors[f"{split}.lengths"] = torch.tensor([len(row) for row in rows], dtype=torch.uint8)
        tensors[f"{split}.labels"] = torch.tensor(texts["label"][:], dtype=torch.uint8)
    save_file(tensors, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", default=text_tasks.MODEL, help="a folder, or pkg://package/folder")
    parser.add_argument("--glue", type=Path, default=GLUE_FOLDER, help="folder of GLUE in the official layout")
    args = parser.parse_args(arguments)
    halve(args.model, args.folder / MODEL_FOLDER)
    tokenize(args.model, args.glue, args.folder / TOKENS_FILE)


if __name__ == "__main__":
    main()
