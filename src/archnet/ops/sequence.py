"""What a translating student needs beyond images: tokens, windows of time, pairs, attention.

All of these work on whole sentences while training, (B, T, C), and are told apart from what runs
token by token by `archnet.convert.stepwise`, which rewrites those that look at other positions.
Padding is only in training batches, where sentences of many lengths meet: ``pad`` inputs,
(B, S) and 1 at padding, keep it from real positions. What is exported reads one length at a time.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from archnet.ops.layout import LayoutMove
from archnet.ops.operators import MaxPooling, Operator, WeightedOperator


class TokenEmbedding(WeightedOperator):
    """A fully connected layer on a one-hot token and a one-hot position: (B, T) -> (B, T, O).

    Weight (O, tokens + positions). Token numbers are looked up; from (B, T, tokens + positions)
    one-hots it multiplies. Both add the same two numbers and nothing else (there is no bias), so
    they agree to the bit.
    """

    def __init__(self, tokens: int, positions: int, out_features: int) -> None:
        super().__init__((out_features, tokens + positions), True)
        self.tokens, self.positions, self.out_features = tokens, positions, out_features
        self.bias.requires_grad_(False)

    def spec(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "positions": self.positions,
            "out_features": self.out_features,
        }

    def forward(self, x: Tensor, first: Tensor | None = None) -> Tensor:
        """``first`` (B, 1) is the position of the first token; 0 where it is left out."""
        weight, _ = self.parameters_on_grid()
        if x.dim() == 3:
            return F.linear(x, weight)
        place = torch.arange(x.shape[1], device=x.device)[None]
        if first is not None:
            place = place + first.long()
        table = weight.t()
        return F.embedding(x.long(), table) + F.embedding(self.tokens + place, table)

    def one_hot(self, x: Tensor, first: Tensor | None = None) -> Tensor:
        """What a chip reads for token numbers (B, T): (B, T, tokens + positions)."""
        place = torch.arange(x.shape[1], device=x.device)[None]
        place = (place if first is None else place + first.long()).expand_as(x)
        return torch.cat(
            [F.one_hot(x.long(), self.tokens), F.one_hot(place, self.positions)], 2
        ).float()


class Window(LayoutMove):
    """Every position beside its neighbours: (B, T, C) -> (B, T, (before + 1 + after) C).

    With a fully connected layer after it, it is a convolution along the sentence; ``after=0``
    makes that causal. Positions outside the sentence are zeros.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.before, self.after = before, after

    def spec(self) -> dict[str, Any]:
        return {"before": self.before, "after": self.after}

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        if pad is not None:
            x = x.masked_fill(pad.bool()[:, :, None], 0.0)
        length = x.shape[1]
        wide = F.pad(x, (0, 0, self.before, self.after))
        views = [wide[:, start : start + length] for start in range(self.before + self.after + 1)]
        return torch.cat(views, 2)


class SplitHeads(LayoutMove):
    """(B, T, H D) -> (B, H, T, D)."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def spec(self) -> dict[str, Any]:
        return {"heads": self.heads}

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class MergeHeads(LayoutMove):
    """(B, H, T, D) -> (B, T, H D)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)


class History(LayoutMove):
    """(B, H, T, D), of which a position reads those up to itself: what decoding keeps."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class MatMul(Operator):
    """A product of two activations times a number: (B, ..., T, D) and (B, ..., D, S), or
    (B, ..., S, D) transposed. ``factor`` is one number, or one for each entry of the axis in front
    of the matrices (heads).
    """

    def __init__(self, transposed: bool = False, factor: float | Sequence[float] = 1.0) -> None:
        super().__init__()
        self.transposed = transposed
        self.factor = tuple(factor) if isinstance(factor, Sequence) else factor

    def spec(self) -> dict[str, Any]:
        factor = list(self.factor) if isinstance(self.factor, tuple) else self.factor
        return {"transposed": self.transposed, "factor": factor}

    def factors(self) -> Tensor:
        """What the product is multiplied by: (), or (heads, 1, 1)."""
        numbers = torch.tensor(self.factor)
        return numbers[:, None, None] if numbers.dim() else numbers

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        product = x @ (y.transpose(-1, -2) if self.transposed else y)
        if isinstance(self.factor, tuple):
            return product * self.factors().to(product)
        return product if self.factor == 1 else product * self.factor


class Softmax(Operator):
    """Along the last axis of scores (B, ..., T, S); ``causal`` keeps position t from later ones."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal

    def spec(self) -> dict[str, Any]:
        return {"causal": self.causal}

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        if self.causal:
            future = torch.ones(x.shape[2:], dtype=torch.bool, device=x.device).triu(1)
            x = x.masked_fill(future, -math.inf)
        if pad is not None:
            x = x.masked_fill(pad.bool()[:, None, None], -math.inf)
        return x.softmax(-1)


class PairFullyConnected(WeightedOperator):
    """A fully connected layer on every pair: (B, T, I), (B, S, J) -> (B, T, S, O).

    It reads the concatenation of a target's and a source's features, weight (O, I + J). Computed
    as one product a side, which is equal by algebra and costs T + S instead of T S positions.
    """

    def __init__(self, first: int, second: int, out_features: int) -> None:
        super().__init__((out_features, first + second), True)
        self.first, self.second, self.out_features = first, second, out_features

    def spec(self) -> dict[str, Any]:
        return {"first": self.first, "second": self.second, "out_features": self.out_features}

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        weight, bias = self.parameters_on_grid()
        left = F.linear(x, weight[:, : self.first], bias)
        right = F.linear(y, weight[:, self.first :])
        return left[:, :, None] + right[:, None]


class SourcePool(MaxPooling):
    """Maximum over source positions, (B, T, S, C) -> (B, T, C).

    Deployed as 2x2 max-pooling that halves the source until one column is left. Repeating a
    position changes nothing, so a source is brought to a power of two by repeating its last.
    """

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        if pad is not None:
            x = x.masked_fill(pad.bool()[:, None, :, None], -math.inf)
        return x.amax(2)
