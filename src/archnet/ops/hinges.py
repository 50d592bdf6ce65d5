"""Sums of hinges of one number, or of the sum of two: the operators, and how they are run.

`HingeLines` computes lines of numbers, an activation rectifies and rounds them, and `HingeSum` adds
them up. With z = x + y of every pair of rows that is a product of matrices, nearly
(`archnet.convert.fit.product`); there are far too many hinges for all of them to exist at once.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from archnet.ops.operators import WeightedOperator

_PART = 2**17  # sums taken at a time on a CPU


class HingeLines(WeightedOperator):
    """The K lines w_k z + b_k of z = x, or of z = x + sign * y: (B, ...) -> (B, ..., K).

    Both have as many axes; along one where either has a single entry it serves all of the other's.
    Weight (K, 1), or (K, 2) with the columns w and sign * w. All of it is constant.

    Args:
        count: K.
        sign: of y, 1 or -1; 0 where there is none.
    """

    def __init__(self, count: int, sign: int = 0) -> None:
        super().__init__((count, 2 if sign else 1), False)
        self.count, self.sign = count, sign

    def spec(self) -> dict[str, Any]:
        return {"count": self.count, "sign": self.sign}

    def forward(self, *sources: Tensor) -> Tensor:
        weight, bias = self.parameters_on_grid()
        joined = torch.stack(torch.broadcast_tensors(*sources), -1)
        return F.linear(joined, weight, bias)


class HingeSum(WeightedOperator):
    """The sum of n times K hinges with signs: (B, ..., n, K) -> (B, ...).

    Weight (1, n K): the same K signs n times. It is constant.
    """

    def __init__(self, terms: int, count: int) -> None:
        super().__init__((1, terms * count), False)
        self.terms, self.count = terms, count

    def spec(self) -> dict[str, Any]:
        return {"terms": self.terms, "count": self.count}

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.flatten(-2), *self.parameters_on_grid()).squeeze(-1)


def on_floats(sources: Sequence[Tensor], lines: HingeLines, total: HingeSum) -> Tensor:
    """The sums of hinges that nothing rounds, one hinge after another."""
    (weight, bias), (outer, offset) = lines.parameters_on_grid(), total.parameters_on_grid()
    numbers = weight[:, 0], bias, outer[0, : total.count]
    first, *others = torch.broadcast_tensors(*sources)
    (second,) = others or [first]
    return cast(Tensor, _Line.apply(first, second, lines.sign, *numbers) + offset)


class _Line(torch.autograd.Function):
    """sum_k o_k max(w_k z + b_k, 0), z = first + sign * second, added over the last axis.

    With t_k = -b_k / w_k and a_k = o_k |w_k| that is the sum of a_k (max(z, t_k) - t_k) where
    w_k > 0, and of a_k (max(z, t_k) - z) where w_k < 0.
    """

    @staticmethod
    def forward(
        ctx: Any, first: Tensor, second: Tensor, sign: int, row: Tensor, bias: Tensor, outer: Tensor
    ) -> Tensor:
        # A hinge of no slope starts at 0, and has no size.
        knots, sizes = torch.where(row == 0, 0.0, -bias / row), outer * row.abs()
        ctx.bends = list(zip(knots.tolist(), sizes.tolist(), strict=True))
        ctx.slope = -float(sizes[row < 0].sum())
        start = -float((sizes * knots)[row > 0].sum())
        ctx.sign = sign
        ctx.save_for_backward(first, second)
        result = first.new_empty(first.shape[:-1])
        for part, z in _sums(first, second, sign):
            total = (ctx.slope * z).add_(start)
            for t, a in ctx.bends:
                total.add_(z.clamp_min(t), alpha=a)
            result[part] = total.sum(-1)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, second = ctx.saved_tensors
        moved = torch.empty(first.shape, dtype=grad.dtype, device=grad.device)
        for part, z in _sums(first, second, ctx.sign):
            given = grad[part].unsqueeze(-1).expand(z.shape)
            total = ctx.slope * given
            for t, a in ctx.bends:
                total.add_(torch.ops.aten.threshold_backward(given, z, t), alpha=a)
            moved[part] = total
        second = moved * ctx.sign if ctx.sign else None
        return moved, second, None, None, None, None


def _sums(first: Tensor, second: Tensor, sign: int) -> Iterable[tuple[slice, Tensor]]:
    """z = first + sign * second of some samples at a time, few enough for a CPU's cache."""
    size = max(1, first[0].numel())
    some = max(1, _PART // size) if first.device.type == "cpu" else len(first)
    z = torch.empty(first[:some].shape, dtype=first.dtype, device=first.device)
    for start in range(0, len(first), some):
        part = slice(start, start + some)
        count = len(first[part])
        if sign:
            yield part, torch.add(first[part], second[part], alpha=sign, out=z[:count])
        else:
            yield part, z[:count].copy_(first[part])
