"""Sums of hinges of one number, or of the sum of two: the operators, and how they are run.

`HingeLines` computes lines of numbers, an activation rectifies and rounds them, and `HingeSum` adds
them up. With z = x + y of every pair of rows that is a product of matrices, nearly
(`archnet.convert.fit.product`); there are far too many hinges for all of them to exist at once.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archnet.ops.graph import Step
from archnet.ops.operators import Activation, WeightedOperator
from archnet.ops.piece import Piece, place_of
from archnet.ops.tables import added

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


class HingeFunction(Piece):
    """Lines, what rectifies them, and what adds the hinges, as one function of z.

    It is piecewise linear, or a table where z lies on a grid.

    Args:
        steps: the three.
        by_name: all steps, to find what rounds the sources.
        operators: of the steps.
    """

    def __init__(
        self, steps: Sequence[Step], by_name: Mapping[str, Step], operators: nn.ModuleDict
    ) -> None:
        super().__init__((steps[-1].name,), steps[0].inputs)
        self.steps = tuple(steps)
        self.places = [place_of(name, by_name, operators) for name in self.reads]

    def work(self, operators: nn.ModuleDict, live: Mapping[str, Tensor]) -> Sequence[Tensor]:
        # A grid has more levels than half precision tells apart.
        with torch.autocast(live[self.reads[0]].device.type, enabled=False):
            lines, act, total = (operators[step.name] for step in self.steps)
            assert isinstance(lines, HingeLines)
            assert isinstance(act, Activation)
            assert isinstance(total, HingeSum)
            sources = [live[name].to(lines.weight.dtype) for name in self.reads]
            grid = self._grid(operators)
            if act.quantizer is None and lines.weight_quantizer is None:
                return [_on_floats(sources, lines, total)]
            if act.quantizer is None or grid is None:
                return [total(act(lines(*sources)))]
            return [_on_grid(sources, grid, lines, act, total)]

    def _grid(self, operators: nn.ModuleDict) -> Any:
        """The quantizer that all sources share, if there is one."""
        if None in self.places:
            return None
        found = [cast(Activation, operators[str(name)]).quantizer for name in self.places]
        return found[0] if all(item is found[0] for item in found) else None


def _numbers(lines: HingeLines, total: HingeSum) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slopes, starts and outer weights (K,), and what is added to the sum of all."""
    (weight, bias), (outer, offset) = lines.parameters_on_grid(), total.parameters_on_grid()
    return weight[:, 0], bias, outer[0, : total.count], offset


def _on_floats(sources: Sequence[Tensor], lines: HingeLines, total: HingeSum) -> Tensor:
    row, bias, outer, offset = _numbers(lines, total)
    first, *others = torch.broadcast_tensors(*sources)
    (second,) = others or [first]
    return cast(Tensor, _Line.apply(first, second, lines.sign, row, bias, outer) + offset)


def _on_grid(
    sources: Sequence[Tensor], grid: Any, lines: HingeLines, act: Activation, total: HingeSum
) -> Tensor:
    """The sums by a table of what comes of every z."""
    x, sign = sources[0], lines.sign
    row, bias, outer, offset = _numbers(lines, total)
    step = grid.scale.detach().to(x)
    start = grid.low if sign == 0 else grid.low + (grid.low if sign > 0 else -grid.high)
    count = (grid.high - grid.low) * (2 if sign else 1) + 1
    trains = torch.is_grad_enabled()
    z = torch.arange(start, start + count, device=x.device) * step
    z.requires_grad_(trains)
    shape = torch.broadcast_shapes(*(source.shape[1:] for source in sources))
    # Rounded as they would be one by one, with the gradient that many would have.
    values = shape.numel() * len(row)
    table = act(z[:, None] * row + bias, values) @ outer
    slopes = table
    if trains:
        (slopes,) = torch.autograd.grad(table.sum(), z, retain_graph=True)
    bounds = (grid.low, grid.high)
    sums = _Sums.apply(sign, table, slopes, step, bounds, *sources)
    return cast(Tensor, sums + offset)


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


class _Sums(torch.autograd.Function):
    """sum_k T[z_k] with z = x + sign * y on a grid, over the last axis of both.

    ``slopes`` says what an entry of the table changes with z; the table has a gradient of its own.

    Args:
        sign: of y, 1 or -1; 0 where there is no y.
        table, slopes: (entries,), from the lowest z on.
        step: of the grid of x and y.
        bounds: the lowest and the highest integer of that grid.
        sources: x and y, which are broadcast.
    """

    @staticmethod
    def forward(
        ctx: Any,
        sign: int,
        table: Tensor,
        slopes: Tensor,
        step: Tensor,
        bounds: tuple[int, int],
        *sources: Tensor,
    ) -> Tensor:
        low, high = bounds
        places = [
            (source / step).round_().sub_(low).clamp_(0, high - low).to(torch.int32)
            for source in sources
        ]
        if sign < 0:
            places[1] = high - low - places[1]
        ctx.sign = sign
        ctx.save_for_backward(slopes, *places)
        result = table.new_empty(torch.broadcast_shapes(*(x.shape for x in places))[:-1])
        for part, index in _entries(places):
            found = table.index_select(0, index.flatten())
            torch.sum(found.view(index.shape), -1, out=result[part])
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slopes, *places = ctx.saved_tensors
        total = torch.zeros_like(slopes)
        moved = [grad.new_empty(x.shape) for x in places]
        for part, index in _entries(places):
            given, flat = grad[part].unsqueeze(-1).expand(index.shape), index.flatten()
            total += added(flat, given.flatten(), len(slopes))
            change = slopes.index_select(0, flat).view(index.shape).mul_(given)
            for own in moved:
                own[part] = change.sum_to_size(own[part].shape)
        if ctx.sign < 0:
            moved[1].neg_()
        return None, total, None, None, None, *moved


def _entries(places: Sequence[Tensor]) -> Iterable[tuple[slice, Tensor]]:
    """Sums of places of some samples at a time, few enough for a CPU's cache."""
    first = places[0]
    size = max(1, torch.broadcast_shapes(*(x.shape[1:] for x in places)).numel())
    some = max(1, _PART // size) if first.device.type == "cpu" else len(first)
    for start in range(0, len(first), some):
        part = slice(start, start + some)
        x, *others = (own[part] for own in places)
        yield part, x + others[0] if others else x
