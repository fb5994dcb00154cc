"""What a tuned model has left of a skill that it was not tuned for: the similarity of sentences."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional import spearman_corrcoef

from benchmarks.shared.text_tasks import MODEL
from geolora_pl.data import GLUE
from geolora_pl.tasks.modes import evaluation
from geolora_pl.tasks.text_models import load_config, load_tokenizer

_TEXTS = 32  # per batch


@torch.no_grad()
def similarity(model: nn.Module, glue: Path) -> dict[str, float]:
    """Spearman correlation of STS-B's dev set with the cosine of mean-pooled embeddings, for which MiniLM was made.

    Args:
        model: A model of transformers with a BERT as its ``base_model``.
        glue: Folder of GLUE in the official layout.
    """
    pairs = GLUE("stsb", str(glue)).load_splits()["val"]
    tokenizer = load_tokenizer(MODEL, load_config(MODEL, {}))
    body = model.base_model
    assert isinstance(body, nn.Module)

    def embed(texts: list[str]) -> Tensor:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        parts = []
        for start in range(0, len(texts), _TEXTS):
            chosen = [texts[i] for i in order[start : start + _TEXTS]]
            batch = tokenizer(chosen, padding=True, truncation=True, max_length=128, return_tensors="pt")
            mask = batch["attention_mask"][..., None]
            parts.append((body(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
        return torch.cat(parts)[torch.tensor(order).argsort()]

    with evaluation(model):
        left, right = (embed(list(pairs[column])) for column in ("text", "text_pair"))
    correlation = spearman_corrcoef(F.cosine_similarity(left, right), torch.tensor(pairs["label"]))
    return {"zero_shot": round(correlation.item(), 5)}
