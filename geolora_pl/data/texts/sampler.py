"""Shuffle the training samples into batches of similar length, in the same order in every process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Dataset, DistributedSampler

_POOL = 50  # number of batches among which texts are sorted, as in transformers' sampler


class ShuffledSampler(DistributedSampler[int]):
    """A sampler with a new order in each epoch, which depends only on the seed and the epoch.

    With lengths, the samples of a batch have similar lengths, so that little is padded. The shuffled samples are cut
    into pools of 50 batches, each pool is sorted and cut into batches, and the batches are shuffled. Every process
    takes its share of a global batch, so the lengths are also similar across processes.

    It is a ``DistributedSampler`` also with one process, because Lightning uses such a sampler unchanged and tells it
    the epoch, while it would wrap any other sampler.

    Args:
        dataset: The data set to sample.
        batch_size: Samples per step and process.
        lengths: Length of every sample; without lengths the order is only shuffled.
        seed: Seed.
        num_replicas: Number of processes.
        rank: The index of this process.
    """

    def __init__(
        self,
        dataset: Dataset[object],
        batch_size: int,
        lengths: Sequence[int] | None = None,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=False, seed=seed)
        self.global_batch = batch_size * num_replicas
        self.lengths = None if lengths is None else np.asarray(lengths)

    def __iter__(self) -> Iterator[int]:
        order = self.order()
        return (
            order[position] for position in super().__iter__()
        )  # the base class chooses the positions of this process

    def order(self) -> list[int]:
        """Return the order of the samples in this epoch, over all processes."""
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(len(self.dataset))  # type: ignore[arg-type]  # a sized data set
        if self.lengths is not None:
            whole = len(order) - len(order) % self.global_batch  # an incomplete batch stays at the end
            size = _POOL * self.global_batch
            for start in range(0, whole, size):
                pool = order[start : min(start + size, whole)]
                pool[:] = pool[self.lengths[pool].argsort(kind="stable")]
            order[:whole] = random.permutation(order[:whole].reshape(-1, self.global_batch)).ravel()
        return [int(index) for index in order]
