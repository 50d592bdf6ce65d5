"""Batches of sentence pairs of like length, bounded by their tokens, numbered by training step."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, count, islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from archnet.tasks.corpus import EncodedText
from archnet.tasks.sampling import mix, permutation
from archnet.tasks.tokenizer import BOS, EOS, PAD

BLOCK = 256  # neighbouring pairs that stay together when an epoch is shuffled
POOL = 32  # blocks whose pairs are sorted by length together: what bounds the memory


class TextBatch(NamedTuple):
    """Padded token numbers: source with its end mark (B, S), target after a begin mark and
    before an end mark (B, T) each.
    """

    source: Tensor
    target_in: Tensor
    target_out: Tensor

    @property
    def source_pad(self) -> Tensor:
        """(B, S), true at padding."""
        return self.source == PAD

    @property
    def real(self) -> Tensor:
        """(B, T), true at target positions that count."""
        return self.target_out != PAD


def collate(text: EncodedText, index: NDArray[np.int64]) -> TextBatch:
    """The pairs of those numbers as one batch."""
    pairs = [text.pair(int(item)) for item in index]
    sources = [[*source.tolist(), EOS] for source, _ in pairs]
    targets = [target.tolist() for _, target in pairs]
    return TextBatch(
        padded(sources),
        padded([[BOS, *target] for target in targets]),
        padded([[*target, EOS] for target in targets]),
    )


def padded(rows: list[list[int]]) -> Tensor:
    """(rows, longest) token numbers, padded at the end."""
    width = max(map(len, rows))
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows])


def epoch_batches(
    text: EncodedText, tokens: int, seed: int, epoch: int
) -> Iterator[NDArray[np.int64]]:
    """The numbers of the pairs in each batch of one epoch; a pure function of its arguments.

    Blocks of neighbours are shuffled, `POOL` of them are sorted by length and cut into batches
    whose longer side, padding and marks included, has at most ``tokens`` tokens, and those come
    in random order. Of a corpus of any size only one pool is looked at at a time.
    """
    blocks = permutation(-(-len(text) // BLOCK), seed, epoch)
    for number, first in enumerate(range(0, len(blocks), POOL)):
        index_, longest_ = [], []
        for block in blocks[first : first + POOL]:
            begin, end = block * BLOCK, min((block + 1) * BLOCK, len(text))
            index_.append(np.arange(begin, end))
            longest_.append(text.lengths(begin, end).max(0) + 1)
        index, longest = np.concatenate(index_), np.concatenate(longest_)
        # Among pairs of one length the order is random.
        salt = mix(np.array([seed], np.uint64), epoch + 5) + np.uint64(number)
        order = np.lexsort((mix(index.astype(np.uint64) + salt, 7), longest))
        cuts, start = [], 0
        for place, length in enumerate(longest[order]):
            if place > start and (place + 1 - start) * length > tokens:
                cuts.append(order[start:place])
                start = place
        cuts.append(order[start:])
        for cut in permutation(len(cuts), seed, epoch * 131071 + number):
            yield index[cuts[cut]]


class StepBatches:
    """Batches from step ``start`` to ``steps``, epoch after epoch; batch t is a function of
    (seed, t). ``len()`` counts from the beginning of the run, as Lightning counts.
    """

    def __init__(
        self,
        text: EncodedText,
        tokens: int,
        steps: int,
        seed: int,
        *,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.text, self.tokens, self.steps, self.seed = text, tokens, steps, seed
        self.start, self.rank, self.world = start, rank, world

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[TextBatch]:
        for index in islice(self.numbers(), self.start, None):
            # Few pairs and many processes: one that would get none takes the first.
            share = index[self.rank :: self.world]
            yield collate(self.text, share if len(share) else index[:1])

    def numbers(self) -> Iterator[NDArray[np.int64]]:
        """The numbers of the pairs in every batch from the first on, over all processes."""
        epochs = (epoch_batches(self.text, self.tokens, self.seed, epoch) for epoch in count())
        return islice(chain.from_iterable(epochs), self.steps)


def batches_an_epoch(text: EncodedText, tokens: int, seed: int) -> int:
    """How many batches the first epoch has; others differ by a few."""
    return sum(1 for _ in epoch_batches(text, tokens, seed, 0))
