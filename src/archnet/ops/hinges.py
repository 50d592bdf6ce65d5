"""Sums of hinges of one number, or of the sum of two: the operators, and how they are run.

`HingeLines` computes lines of numbers, an activation rectifies and rounds them, and `HingeSum` adds
them up. With z = x + y of every pair of rows that is a product of matrices, nearly
(`archnet.convert.fit.product`); there are far too many hinges for all of them to exist at once.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archnet.ops.graph import Step
from archnet.ops.operators import Activation, WeightedOperator
from archnet.ops.piece import Piece, place_of
from archnet.ops.tables import lookup

_PART = 2**17  # sums taken at a time on a CPU
_MARKS = 2**22  # entries of the two factors of sums over pairs taken at a time on a CPU


class HingeLines(WeightedOperator):
    """K lines w_k z + b_k of z = x, or of z = x + sign * y: (B, ...) -> (B, ..., K).

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


class Bent(Piece):
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
    (x, *others), sign = sources, lines.sign
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
    if others and _are_pairs(x, *others):
        levels = grid.high - grid.low + 1
        sums = _Pairs.apply(x, others[0], sign, table, slopes, step, (grid.low, levels))
    else:
        z = torch.add(x, others[0], alpha=sign) if others else x
        first = torch.full((), float(-start), device=x.device)
        sums = lookup(z, table, slopes, step, first).sum(-1)
    return cast(Tensor, sums + offset)


def _are_pairs(x: Tensor, y: Tensor) -> bool:
    """Whether rows of one meet several of the other, and their sums go over the last axis."""
    more = [a - b for a, b in zip(x.shape[1:-1], y.shape[1:-1], strict=True)]
    return x.shape[-1] == y.shape[-1] and min(more, default=0) < 0 < max(more, default=0)


class _Line(torch.autograd.Function):
    """sum_k o_k max(w_k z + b_k, 0), z = first + sign * second, added over the last axis.

    With t_k = -b_k / w_k and a_k = o_k |w_k| that is the sum of a_k (max(z, t_k) - t_k) where
    w_k > 0, and of a_k (max(z, t_k) - z) where w_k < 0.
    """

    @staticmethod
    def forward(
        ctx: Any, first: Tensor, second: Tensor, sign: int, row: Tensor, bias: Tensor, outer: Tensor
    ) -> Tensor:
        knots, sizes = -bias / row, outer * row.abs()
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
    """Z = first + sign * second of some samples at a time, few enough for a CPU's cache."""
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


class _Pairs(torch.autograd.Function):
    """sum_k T[x_mk + sign * y_nk] for all pairs of rows: a table T of sums of two levels.

    With a one-hot mark for the level of x, and for y the stretch of T that its level shifts to the
    front, that is a product of two matrices: over k and the levels, instead of a look-up for each
    pair. ``slopes`` says what an entry changes with z; the table has a gradient of its own.

    Args:
        x, y: (B, ..., K), along each axis alike or one of them with a single entry.
        sign: 1 or -1.
        table, slopes: (entries,), from the lowest sum on.
        step: of the grid of both.
        levels: the lowest of them, and how many.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        sign: int,
        table: Tensor,
        slopes: Tensor,
        step: Tensor,
        levels: tuple[int, int],
    ) -> Tensor:
        low, count = levels
        ctx.frame, ctx.sign, ctx.count = _Frame(x.shape, y.shape), sign, count
        ours, theirs = (
            (value / step).round_().sub_(low).clamp_(0, count - 1).to(torch.int32)
            for value in (x, y)
        )
        if sign < 0:
            theirs = count - 1 - theirs
        ours, theirs = ctx.frame.rows(ours, 0), ctx.frame.rows(theirs, 1)
        ctx.save_for_backward(ours, theirs, slopes)
        eye, shifted = _one_hot(count, table), table.unfold(0, count, 1)
        result = table.new_empty(*ours.shape[:3], theirs.shape[2])
        for part in _some(ours, theirs, count):
            marks, stretches = _picked(eye, ours[part]), _picked(shifted, theirs[part])
            torch.matmul(marks.flatten(3), stretches.flatten(3).mT, out=result[part])
        return ctx.frame.result(result)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ours, theirs, slopes = ctx.saved_tensors
        count, frame = ctx.count, ctx.frame
        grad = frame.given(grad)
        eye, shifted = _one_hot(count, grad), slopes.unfold(0, count, 1)
        moved = [grad.new_empty(places.shape) for places in (ours, theirs)]
        by_shift = grad.new_zeros(count, count)
        for part in _some(ours, theirs, count):
            given, marks = grad[part], _picked(eye, ours[part])
            stretches = _picked(shifted, theirs[part])
            to_marks = (given @ stretches.flatten(3)).view(marks.shape)
            to_stretches = (given.mT @ marks.flatten(3)).view(stretches.shape)
            moved[0][part] = (to_marks * marks).sum(-1)
            moved[1][part] = (to_stretches * stretches).sum(-1)
            shifts = _picked(eye, theirs[part]).view(-1, count)
            by_shift.addmm_(shifts.mT, to_stretches.view(-1, count))
        # Entry i of the stretch shifted by j is entry i + j of the table.
        total = F.fold(by_shift.mT[None], (1, 2 * count - 1), (1, count)).flatten()
        x, y = (frame.back(values, side) for side, values in enumerate(moved))
        return x, y * ctx.sign, None, total, None, None, None


def _one_hot(count: int, like: Tensor) -> Tensor:
    return torch.eye(count, dtype=like.dtype, device=like.device)


def _some(ours: Tensor, theirs: Tensor, count: int) -> Iterable[slice]:
    """Some samples at a time."""
    size = max(1, (ours[0].numel() + theirs[0].numel()) * count)
    some = max(1, _MARKS // size) if ours.device.type == "cpu" else len(ours)
    return [slice(start, start + some) for start in range(0, len(ours), some)]


def _picked(rows: Tensor, places: Tensor) -> Tensor:
    """Rows of a matrix at all places: (..., levels)."""
    return rows.index_select(0, places.flatten()).view(*places.shape, rows.shape[1])


class _Frame:
    """Axes of two values in groups: the batch, those of both, those of either alone, the last."""

    def __init__(self, x: Sequence[int], y: Sequence[int]) -> None:
        self.shapes, axes = (tuple(x), tuple(y)), range(1, len(x) - 1)
        both = [axis for axis in axes if x[axis] == y[axis]]
        self.groups = (
            [0],
            both,
            [axis for axis in axes if x[axis] > y[axis]],
            [axis for axis in axes if x[axis] < y[axis]],
        )

    def rows(self, value: Tensor, side: int) -> Tensor:
        """A value as (B, both, alone, K)."""
        return _folded(value, (*self._groups(side), [value.dim() - 1]))

    def back(self, rows: Tensor, side: int) -> Tensor:
        """What `rows` made of a value, in its shape."""
        last = len(self.shapes[side]) - 1
        return _unfolded(rows, (*self._groups(side), [last]), self.shapes[side])

    def _groups(self, side: int) -> tuple[list[int], ...]:
        batch, both, *alone = self.groups
        # The other's axes have a single entry here.
        return batch, both, [*alone[side], *alone[1 - side]]

    def result(self, sums: Tensor) -> Tensor:
        """Sums (B, both, first, second) in the shape that both values have together."""
        return _unfolded(sums, self.groups, torch.broadcast_shapes(*self.shapes)[:-1])

    def given(self, grad: Tensor) -> Tensor:
        """A gradient of `result` as (B, both, first, second)."""
        return _folded(grad, self.groups)


def _folded(value: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """A value whose axes are groups of its own ones."""
    turned = value.permute([axis for group in groups for axis in group])
    return turned.reshape([math.prod(value.shape[axis] for axis in group) for group in groups])


def _unfolded(value: Tensor, groups: Sequence[Sequence[int]], shape: Sequence[int]) -> Tensor:
    """A value whose axes are groups of those of ``shape``, in that shape."""
    order = [axis for group in groups for axis in group]
    turned = value.reshape([shape[axis] for axis in order])
    return turned.permute([order.index(axis) for axis in range(len(order))])
