"""Find out whether a model reads each text of a packed sequence as if it were alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from geolora_pl.tasks.modes import evaluation

_TOKENS = 8  # of each text
_SHARE = 0.05  # of what a neighbour changes, far above what rounding does to a model of any depth


@torch.no_grad()
def check_isolation(
    model: nn.Module, forward: Callable[[Mapping[str, Tensor]], Tensor], rows: int, device: torch.device
) -> None:
    """Refuse a model that sees the neighbour of a text, by trying it: that costs three short forward passes.

    What a second text gives behind a first one is compared with what it gives alone. How much the first one changes
    where it may be seen is the measure of what is small, in every precision.

    Args:
        model: What is tried, in evaluation mode.
        forward: From a batch to logits (batch, length, vocabulary).
        rows: The number of tokens that the model has embeddings for.
        device: Where the tokens are put.

    Raises:
        ValueError: The model takes no ``position_ids``, or sees the first text.
    """
    both = (torch.arange(2 * _TOKENS, device=device) % rows)[None]
    second = both[:, _TOKENS:]
    positions = torch.arange(_TOKENS, device=device).repeat(2)[None]
    with evaluation(model):
        alone = forward({"input_ids": second}).float()
        seen = forward({"input_ids": both})
        try:
            packed = forward({"input_ids": both, "position_ids": positions})[:, _TOKENS:].float()
        except TypeError as error:  # an argument that forward does not have
            raise _refusal(model, str(error)) from error
    allowed = _SHARE * (seen[:, _TOKENS:].float() - alone).abs().max()
    rounding = 16 * torch.finfo(seen.dtype).eps * alone.abs().max()
    if not (packed - alone).abs().max() <= torch.maximum(allowed, rounding):
        raise _refusal(model, "position_ids that restart do not keep texts apart")


def _refusal(model: nn.Module, reason: str) -> ValueError:
    return ValueError(
        f"{type(model).__name__} would see the neighbours of a text in a packed sequence ({reason}): set packed to "
        "false, so that texts are padded"
    )
