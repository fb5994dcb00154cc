"""Score the entities that tags of words stand for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

_BEGIN, _END = set("BSU"), set("ESLU")  # of BIO, and of BIOES and BILOU
OUTSIDE = "O"


def name_entities(tags: Sequence[str]) -> bool:
    """Whether tags are those of entities: ``O``, and a letter of BIO, BIOES or BILOU before the kind of each.

    Example:
        >>> name_entities(["O", "B-PER", "I-PER"]), name_entities(["NOUN", "VERB"])
        (True, False)
    """
    return OUTSIDE in tags and all(tag == OUTSIDE or (tag[:1] in "BIESLU" and tag[1:2] == "-") for tag in tags)


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The kind, the first word and the end of each entity.

    As in the scorer of CoNLL-2000, an entity also begins where a tag ``I`` follows another kind or nothing.

    Example:
        >>> sorted(entities(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"]))
        [('LOC', 3, 4), ('LOC', 4, 5), ('PER', 0, 2)]
    """
    found: set[tuple[str, int, int]] = set()
    start, last, inside = 0, "", ""  # the first word, the letter of the word before, and the kind of the open entity
    for position, tag in enumerate([*tags, OUTSIDE]):
        letter, _, kind = tag.partition("-")
        if kind != inside or letter in _BEGIN or last in _END:
            if inside:
                found.add((inside, start, position))
            start, inside = position, kind
        last = letter
    return found


class EntityScore(Metric):
    """The F1 of entities over all sentences, an entity being right if its kind and all its words are.

    Example:
        >>> score = EntityScore()
        >>> score.update([["B-PER", "I-PER", "O", "B-LOC"]], [["B-PER", "I-PER", "O", "O"]])
        >>> round(score.compute().item(), 4)  # one of two is right, and one of one found
        0.6667
    """

    higher_is_better = True
    full_state_update = False
    right: Tensor
    predicted: Tensor
    there: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("right", "predicted", "there"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[Sequence[str]], targets: Sequence[Sequence[str]]) -> None:
        """Count the entities of sentences, by the tags of their words."""
        for predicted, target in zip(predictions, targets, strict=True):
            found, there = entities(predicted), entities(target)
            self.right += len(found & there)
            self.predicted += len(found)
            self.there += len(there)

    def compute(self) -> Tensor:
        """Return ``2 right / (predicted + there)``, which is 0 where there are none of both."""
        return 2 * self.right / (self.predicted + self.there).clamp_min(1)
