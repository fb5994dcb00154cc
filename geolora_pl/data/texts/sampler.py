"""The order of the training samples: shuffled, in batches of similar length, the same in every process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Dataset, DistributedSampler

_POOL = 50  # batches among which texts are sorted: as many as transformers' sampler takes


class ShuffledSampler(DistributedSampler[int]):
    """A new order of the samples each epoch, a function of seed and epoch alone.

    With lengths, the samples of a batch have similar lengths, so that little is padded. The shuffled samples are cut
    into pools of 50 batches, each pool is sorted and cut into batches, and the batches are shuffled. Of a global
    batch every process takes its share, and they are of similar length across the processes, too.

    It is a ``DistributedSampler`` with one process as well: Lightning leaves such a sampler as it is and tells it the
    epoch, where it would wrap another in one.

    Args:
        dataset: What is sampled.
        batch_size: Samples a step and process.
        lengths: Length of every sample; by default the order is merely shuffled.
        seed: Seed.
        num_replicas: Number of processes.
        rank: Which of them this is.
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
        return (order[position] for position in super().__iter__())  # which of the positions are this process's

    def order(self) -> list[int]:
        """The samples of this epoch, over all processes."""
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(len(self.dataset))  # type: ignore[arg-type]  # a sized data set
        if self.lengths is not None:
            whole = len(order) - len(order) % self.global_batch  # a smaller batch stays the last
            size = _POOL * self.global_batch
            for start in range(0, whole, size):
                pool = order[start : min(start + size, whole)]
                pool[:] = pool[self.lengths[pool].argsort(kind="stable")]
            order[:whole] = random.permutation(order[:whole].reshape(-1, self.global_batch)).ravel()
        return [int(index) for index in order]
