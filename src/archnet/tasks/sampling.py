"""Which image is drawn at which training step, with which random key.

Everything random about a batch follows from `(seed, step)`. A run that is killed and resumed at
step t, or spread over several processes, therefore sees the data of a run that was never stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler


class Draw(NamedTuple):
    """One image asked of a dataset: which item, and the key from which its augmentation derives."""

    item: int
    key: int


def mix(values: NDArray[np.uint64], stream: int) -> NDArray[np.uint64]:
    """Scrambled 64-bit words of `values`, independent between streams.

    The finaliser of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
    generators"). A hash rather than a generator, so that a whole batch of keys is scrambled at once
    and no state is kept.
    """
    with np.errstate(over="ignore"):
        word = values + np.uint64(0x9E3779B97F4A7C15) * np.uint64(stream + 1)
        word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return word ^ (word >> np.uint64(31))


def uniform(keys: NDArray[np.uint64], stream: int) -> NDArray[np.float64]:
    """One number in [0, 1) for each key, independent between streams."""
    return (mix(keys, stream) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order in which `size` items are visited in an epoch, (size,)."""
    word = mix(mix(np.array([seed], np.uint64), 0) + np.uint64(epoch), 1)
    generator = torch.Generator().manual_seed(int(word[0] >> np.uint64(1)))
    return torch.randperm(size, generator=generator).numpy()


class StepBatchSampler(Sampler[list[Draw]]):
    """Batches numbered by training step; batch t is a pure function of (seed, t).

    Items are shuffled anew each epoch and drawn without replacement; a batch may straddle two
    epochs, so that every batch is full.

    Args:
        size: items in the dataset.
        batch_size: items in one global batch, over all processes.
        steps: the training's length; batches 0 to steps - 1 exist.
        seed: of the shuffle and of the augmentation keys.
        start: first step to yield, the number of steps already trained.
        rank, world: this process and how many there are; each takes every world-th item of the
            global batch.

    `len()` is `steps` whatever `start` is: Lightning counts batches from the beginning of the run
    and would end a resumed one early otherwise.

    Raises:
        ValueError: for an empty dataset, or a global batch that the processes cannot share evenly.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        steps: int,
        seed: int,
        *,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if size < 1:
            raise ValueError("StepBatchSampler needs at least one item to draw from")
        if batch_size < 1 or batch_size % world:
            raise ValueError(
                f"a global batch of {batch_size} cannot be shared evenly by {world} processes"
            )
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is outside a world of {world}")
        self.size, self.batch_size, self.steps, self.seed = size, batch_size, steps, seed
        self.start, self.rank, self.world = start, rank, world
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def batch(self, step: int) -> list[Draw]:
        """The draws of global batch `step` that fall to this process."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)[
            self.rank :: self.world
        ]
        salt = mix(np.array([self.seed], np.uint64), 2)
        keys = mix(salt + positions.astype(np.uint64), 3) >> np.uint64(1)
        return [
            Draw(int(self._visit(position // self.size)[position % self.size]), int(key))
            for position, key in zip(positions.tolist(), keys, strict=True)
        ]

    def _visit(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self.size, self.seed, epoch)
        return self._order

    def __iter__(self) -> Iterator[list[Draw]]:
        return (self.batch(step) for step in range(self.start, self.steps))

    def __len__(self) -> int:
        return self.steps


class SequentialBatchSampler(Sampler[list[Draw]]):
    """Every item once, in order, for evaluation; each process takes every world-th batch."""

    def __init__(self, size: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.size, self.batch_size, self.rank, self.world = size, batch_size, rank, world

    def __iter__(self) -> Iterator[list[Draw]]:
        for first in range(self.rank * self.batch_size, self.size, self.world * self.batch_size):
            yield [Draw(item, 0) for item in range(first, min(first + self.batch_size, self.size))]

    def __len__(self) -> int:
        return len(range(self.rank * self.batch_size, self.size, self.world * self.batch_size))
