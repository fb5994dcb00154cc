"""Make a batch of sequences that have more columns than a tokenizer knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that is not learnt; cross_entropy leaves it out


def pad(
    samples: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    multiple: int | None,
    fillers: Mapping[str, int],
) -> dict[str, Tensor]:
    """Pad sequences on the right to the longest of them.

    Args:
        samples: Lists by name, all those of a sample of one length.
        tokenizer: The tokenizer, which pads what it made.
        multiple: The length of a batch is a multiple of this number.
        fillers: What the other columns are padded with; those that the samples lack are left out.

    Returns:
        Tensors (batch, length) by name.
    """
    inputs = [{name: row[name] for name in tokenizer.model_input_names if name in row} for row in samples]
    padded = tokenizer.pad(inputs, padding_side="right", pad_to_multiple_of=multiple, return_tensors="pt")
    batch: dict[str, Tensor] = dict(padded)
    length = batch["input_ids"].shape[1]
    for name in fillers.keys() & samples[0].keys():
        batch[name] = torch.tensor([[*row[name], *[fillers[name]] * (length - len(row[name]))] for row in samples])
    return batch
