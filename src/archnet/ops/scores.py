"""What a result means: where its classes lie, what it decides, and how far two results are apart.

A result of a network has an axis along which its classes lie, or none. The batch is axis 0.

| result | shape | axis |
| --- | --- | --- |
| class scores | (B, K) | 1 |
| class scores of every pixel | (B, K, H, W) | 1 |
| class scores of every token | (B, T, K) | -1 |
| numbers: a regression, an embedding, features, the raw head of a detector | any | None |

A result with classes makes one *decision* for every place that is left without that axis: for each
sample, pixel or token. A result without classes decides nothing: of two, the numbers are compared.
Nothing else in archnet takes a largest score, a softmax or a count of decisions for a comparison.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

Axis = int | None
Numbers = Tensor | NDArray[Any]

ROUNDING = 1e-5  # of the largest score: what float32 sums in another order may move


def each(result: Any) -> tuple[Tensor, ...]:
    """What a student gives, as a tuple: one tensor or several."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def axis_of(shape: Sequence[int]) -> Axis:
    """Where classes lie in the one result of a network that says nothing of it.

    Args:
        shape: of a sample's result: (K,) and (K, H, W) have them first, (T, K) last. One number
            for each place, and any other shape, has none.
    """
    axis = {1: 1, 2: -1, 3: 1}.get(len(shape))
    return axis if axis is not None and (1, *shape)[axis] > 1 else None


def count(shape: Sequence[int], axis: Axis) -> int:
    """How many decisions a result of ``shape``, batch included, makes."""
    return 0 if axis is None else math.prod(shape) // shape[axis]


def decisions(scores: Numbers, axis: int) -> Tensor:
    """The class of every decision: ``scores`` without ``axis``."""
    return _tensor(scores).argmax(axis)


def changed(expected: Numbers, found: Numbers, axis: Axis) -> Tensor:
    """Which decisions are others in ``found``: (...) without the axis, bool; empty without classes.

    Equal scores, which few bits make common, are a tie that float rounding decides: either winner
    is right. Scores that are no number, where a number is expected, decide nothing right.

    >>> changed(torch.tensor([[1.0, 3.0], [2.0, 2.0]]), torch.tensor([[3.0, 1.0], [0.0, 1.0]]), 1)
    tensor([ True, False])
    """
    if axis is None:
        return torch.zeros(0, dtype=torch.bool)
    expected, found = _tensor(expected), _tensor(found)
    winner = expected.gather(axis, found.argmax(axis, keepdim=True)).squeeze(axis)
    rounding = ROUNDING * expected.abs().amax(axis)
    broken = (expected.isfinite() & ~found.isfinite()).any(axis)
    return ~(expected.amax(axis) - winner <= rounding) | broken


def agreement(ours: Tensor, theirs: Tensor, axis: int) -> Tensor:
    """Share of equal decisions, 0 to 1."""
    return (decisions(ours, axis) == decisions(theirs, axis)).float().mean()


def accuracy(scores: Tensor, labels: Tensor, axis: int) -> Tensor:
    """Share of decisions that are the label, 0 to 1.

    Args:
        scores: of a network.
        labels: classes, of the shape of its decisions; those outside 0 to K - 1 (a border that is
            not to be judged, 255) do not count.
        axis: of the classes.
    """
    known = (labels >= 0) & (labels < scores.shape[axis])
    right = (decisions(scores, axis) == labels) & known
    return right.sum() / known.sum().clamp_min(1)


def divergence(kind: str, scores: Tensor, reference: Tensor, axis: int) -> Tensor:
    """The distance of class scores from a reference, one for every decision: without the axis.

    Args:
        kind: ``kl``: Kullback-Leibler divergence of the class probabilities from the reference's,
            in nats (Hinton et al. 2015, temperature 1). ``cosine``: 1 - cosine similarity, as Xu et
            al. 2021 have it.
        scores, reference: of one shape.
        axis: of the classes.
    """
    if kind == "cosine":
        return 1 - F.cosine_similarity(scores, reference, dim=axis)
    ours, theirs = F.log_softmax(scores, axis), F.log_softmax(reference, axis)
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(axis)


def unexplained(found: Tensor, reference: Tensor, real: Tensor | None = None) -> Tensor:
    """Share of the reference's variance that is not explained: MSE / variance.

    Args:
        found, reference: of one shape.
        real: (B, T), of (B, T, C): positions where it is false do not count. They are set to zero:
            choosing the others would copy them, and their gradients back.
    """
    if real is None:
        return F.mse_loss(found, reference) / reference.var().clamp_min(1e-12)
    hidden, places = ~real[..., None], real.sum() * reference.shape[-1]
    mean = reference.masked_fill(hidden, 0.0).sum() / places
    variance = (reference - mean).masked_fill_(hidden, 0.0).square_().sum() / (places - 1)
    error = (found - reference).masked_fill(hidden, 0.0).square().sum() / places
    return error / variance.clamp_min(1e-12)


def loss(
    kind: str, scores: Tensor, reference: Tensor, axis: Axis, real: Tensor | None = None
) -> Tensor:
    """How far a result is from a reference, one number.

    With classes the mean divergence of all decisions (``kind`` as in `divergence`), over those
    where ``real`` is true; without classes the share of unexplained variance.
    """
    if axis is None:
        return unexplained(scores, reference, real)
    distance = divergence(kind, scores, reference, axis)
    if real is None:
        return distance.mean()
    return distance.masked_fill(~real, 0.0).sum() / real.sum()


class Loss:
    """`loss` of a result over many batches of any sizes, in float64.

    With classes the mean Kullback-Leibler divergence of all decisions; without, |found -
    reference|² / |reference - its mean|², the share of unexplained variance.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.distance = self.size = 0.0

    def add(self, scores: Tensor, reference: Tensor) -> None:
        """Results of one batch, of one shape."""
        scores, reference = scores.double(), reference.double()
        if self.axis is None:
            self.distance += float((scores - reference).square().sum())
            self.size += float((reference - reference.mean()).square().sum())
        else:
            self.distance += float(divergence("kl", scores, reference, self.axis).sum())
            self.size += count(reference.shape, self.axis)

    @property
    def value(self) -> float:
        return self.distance / max(self.size, 1e-30)


class Comparison:
    """Two networks' results beside each other, batch by batch.

    Attributes:
        axis: of the classes; None: there are none.
        decisions: how many there were.
        changed: how many are others; ties count as equal (`changed`).
        largest: largest absolute difference; nan where one is no number.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.decisions = self.changed = 0
        self.largest = 0.0
        self._error = self._expected = self._found = self._product = 0.0

    def add(self, expected: Numbers, found: Numbers) -> None:
        """Results of one batch, of one shape."""
        expected, found = _tensor(expected), _tensor(found)
        differs = changed(expected, found, self.axis)
        self.changed += int(differs.sum())
        self.decisions += differs.numel()
        ours, theirs = found.double().flatten(), expected.double().flatten()
        # Unlike max(), np.maximum keeps a NaN.
        self.largest = float(np.maximum(self.largest, float((ours - theirs).abs().max())))
        self._error += float((ours - theirs).square().sum())
        self._expected += float(theirs.square().sum())
        self._found += float(ours.square().sum())
        self._product += float(ours @ theirs)

    @property
    def agreement(self) -> float | None:
        """Share of equal decisions, 0 to 1; None where none is made."""
        return 1 - self.changed / self.decisions if self.decisions else None

    @property
    def relative_error(self) -> float:
        """|found - expected| / |expected|, over all batches."""
        return math.sqrt(self._error / max(self._expected, 1e-300))

    @property
    def cosine(self) -> float:
        """Cosine similarity of all numbers, as one vector: 1 where they are multiples."""
        size = math.sqrt(self._expected) * math.sqrt(self._found)
        return self._product / size if size else float(self._expected == self._found)


def _tensor(numbers: Numbers) -> Tensor:
    if isinstance(numbers, Tensor):
        return numbers.detach()
    return torch.from_numpy(np.ascontiguousarray(numbers))
