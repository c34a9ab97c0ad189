"""Which sample comes when. Positions are global, so ranks, workers and restarts change nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class EndlessBatchSampler(Sampler[list[tuple[int, int]]]):
    """Walks positions p = start, start + 1, ... of an endless stream, in batches.

    Position p is item p % n of the order of epoch p // n, a permutation drawn from
    (seed, epoch). Rank r of W takes positions start + r, start + r + W, ...: the global batch b
    of all ranks together is the next W * batch_size positions, and every sample is seen exactly
    once per epoch whatever the number of ranks and the batch size.

    Args:
        num_samples: n, the number of samples in the data set.
        batch_size: samples per batch of this rank.
        seed: of the orders.
        start: first position; the number of samples that all ranks together have seen before.
        rank, world_size: of this process.

    Yields:
        lists of `batch_size` pairs (epoch, index).
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        samples = self._samples()
        while True:
            yield list(itertools.islice(samples, self.batch_size))

    def _samples(self) -> Iterator[tuple[int, int]]:
        current_epoch, order = -1, np.empty(0, dtype=np.int64)
        for position in itertools.count(self.start + self.rank, self.world_size):
            epoch, offset = divmod(position, self.num_samples)
            if epoch != current_epoch:
                generator = np.random.default_rng([self.seed, epoch])
                current_epoch, order = epoch, generator.permutation(self.num_samples)
            yield epoch, int(order[offset])


class RankSampler(Sampler[int]):
    """Indices rank, rank + world_size, ... below `num_samples`: split over ranks, never padded.

    Repeating samples to give all ranks equally many, as DistributedSampler does, would count
    them twice in the accuracy.
    """

    def __init__(self, num_samples: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.indices = range(rank, num_samples, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)
