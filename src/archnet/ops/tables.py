"""Sums of lines that are cut off, as functions of one number or of a sum of two: how they are run.

Lines, the activation that cuts them off and rounds them, and the layer that adds them are large:
there are several numbers for each one that is read. But each is a function of the number read, and
where that lies on a grid, a function of a few hundred levels (of every channel). So the steps are
run on the levels, and what is computed is looked up. The gradients that the numbers of one level
receive are added up and go through the steps once. Values and gradients are the same.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from archnet.ops.graph import Step
from archnet.ops.hinges import HingeLines, HingeSum, on_floats
from archnet.ops.operators import Activation, Convolution, Segments, clipped
from archnet.ops.piece import Piece, place_of

PART = 2**17  # sums taken at a time on a CPU
_PLACES = 2**18  # numbers in which a GPU adds up what belongs to the entries of a table
_MOST = 256  # of the tensors that are kept
_LARGEST = 2**22  # entries of a table that are told apart by half a step in single precision


@dataclass
class _Lines:
    """K lines of each of C channels, between ``bounds`` if there are any, and how they are added.

    Slopes, starts and weights of the sum are (C, K, 1), (C, K, 1) and (C, 1, K); bounds (1, K, 1).
    The sums of ``terms`` numbers are added up, and the offset, (C, 1, 1).
    """

    weight: Tensor
    bias: Tensor
    bounds: Sequence[Tensor]
    outer: Tensor
    offset: Tensor
    terms: int

    @classmethod
    def of_hinges(cls, lines: HingeLines, total: HingeSum) -> "_Lines":
        (weight, bias), (outer, offset) = lines.parameters_on_grid(), total.parameters_on_grid()
        outer = outer if total.terms == 1 else outer[:, : total.count]
        return cls(
            (weight if weight.shape[1] == 1 else weight[:, :1])[None],
            bias[None, :, None],
            (),
            outer[None],
            offset[:, None, None],
            total.terms,
        )

    @classmethod
    def of_segments(cls, segments: Segments, merge: Convolution) -> "_Lines":
        weight, bias = merge.parameters_on_grid()
        return cls(
            segments.weight.t()[..., None],
            segments.bias.t()[..., None],
            [bound[None] for bound in segments.bounds],
            weight.flatten(1)[:, None],
            bias[:, None, None],
            1,
        )

    def table(self, z: Tensor, act: Activation, values: int) -> tuple[Tensor, Tensor]:
        """The sum at every z, (L,), for each channel and what it changes with z: (C, 1, L) each.

        Rounded as many ``values`` of a sample would be one by one, with the gradient of these.
        """
        lines = torch.addcmul(self.bias, z, self.weight)
        cut = clipped(lines, *self.bounds) if self.bounds else lines
        rounded = act(cut, values * lines.shape[1])
        if self.terms == 1:
            sums = torch.baddbmm(self.offset, self.outer, rounded)
        else:
            sums = torch.bmm(self.outer, rounded)
        if not torch.is_grad_enabled():
            return sums, sums
        with torch.no_grad():
            slopes = self.weight * (cut == lines) if self.bounds else self.weight.expand_as(lines)
            return sums, torch.bmm(self.outer, act.passed(cut, slopes))


class Tabled(Piece):
    """Lines, what rounds them, what adds them, and what rounds the sum, as one function.

    Args:
        steps: these, in order; the last one may be missing.
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
            lines, act, total, *last = (operators[step.name] for step in self.steps)
            assert isinstance(act, Activation)
            dtype = cast(Tensor, lines.weight).dtype
            sources = [live[name].to(dtype) for name in self.reads]
            if isinstance(lines, HingeLines) and act.quantizer is None is lines.weight_quantizer:
                return [on_floats(sources, lines, cast(HingeSum, total))]
            grid = self._grid(operators)
            if grid is not None and act.quantizer is not None:
                found = self._looked_up(sources, grid, operators)
                if found is not None:
                    return [found]
            x = lines(*sources)
            for module in (act, total, *last):
                x = module(x)
            return [x]

    def _grid(self, operators: nn.ModuleDict) -> Any:
        """The quantizer that all sources share, if there is one."""
        if None in self.places:
            return None
        found = [cast(Activation, operators[str(name)]).quantizer for name in self.places]
        return found[0] if all(item is found[0] for item in found) else None

    def _looked_up(
        self, sources: Sequence[Tensor], grid: Any, operators: nn.ModuleDict
    ) -> Tensor | None:
        """The result by a table, if it is smaller than what is looked up."""
        lines, act, total, *last = (operators[step.name] for step in self.steps)
        shape = torch.broadcast_shapes(*(source.shape for source in sources))
        if isinstance(lines, HingeLines):
            sign, channels = lines.sign, 1
            parts = _Lines.of_hinges(lines, cast(HingeSum, total))
        else:
            sign, channels = 0, shape[1]
            parts = _Lines.of_segments(cast(Segments, lines), cast(Convolution, total))
        low, high = grid.low, grid.high
        if sign:
            low, high = (low + low, high + high) if sign > 0 else (low - high, high - low)
        entries = channels * (high - low + 1)
        if entries > _LARGEST or (sign == 0 and 2 * entries > sources[0].numel()):
            return None
        step = grid.scale.detach().to(sources[0])
        values = shape[1:].numel()
        table, slopes = parts.table(
            kept(_levels, step, low, high) * step, cast(Activation, act), values
        )
        for module in cast(list[Activation], last):
            if torch.is_grad_enabled():
                slopes = module.passed(table.detach(), slopes)
            table = module(table, values)
        is_sum = isinstance(lines, HingeLines)
        axes = 0 if is_sum else len(shape) - 2
        starts = kept(_starts, step, grid.low, grid.high, sign, channels, axes)
        result = _Lookup.apply(
            table.flatten(), slopes.flatten(), step, starts, sign, is_sum, *sources
        )
        return cast(Tensor, result if parts.terms == 1 else result + parts.offset.flatten())


Made = TypeVar("Made")
_made: dict[tuple[Any, ...], Any] = {}


def kept(make: Callable[..., Made], like: Tensor, *numbers: Any) -> Made:
    """make(*numbers, device), which is the same at every step: kept, since it costs launches, and
    the host waits for what it sends. Not what is made while ``like`` stands for another tensor, as
    in torch.export, nor in inference mode.
    """
    if type(like) not in (Tensor, nn.Parameter) or torch.is_inference_mode_enabled():
        return make(*numbers, like.device)
    key = make, like.device, *numbers
    if key not in _made:
        if len(_made) > _MOST:
            _made.clear()
        _made[key] = make(*numbers, like.device)
    return cast(Made, _made[key])


def _levels(low: int, high: int, device: torch.device) -> Tensor:
    """The integers of a grid."""
    return torch.arange(low, high + 1, device=device)


def _starts(
    low: int, high: int, sign: int, channels: int, axes: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What is added to x / step, and to sign * y / step, so that they are places in a table.

    Each channel has a part of it, channels being followed by so many axes.
    """
    first = torch.arange(channels, device=device) * (high - low + 1) - low
    # Half a step more, so that the whole part is the nearest level.
    second = torch.tensor([high if sign < 0 else -low], device=device)
    return first.reshape(channels, *[1] * axes) + 0.5, second + 0.5


class _Lookup(torch.autograd.Function):
    """T[x], or T[x + sign * y] with the last axis of both added up, for x and y on a grid.

    ``slopes`` are what entries of the table T change with x; T has a gradient of its own.

    Args:
        table, slopes: (entries,).
        step: of the grid, (1,).
        starts: of `_starts`.
        sign: of y, 1 or -1; 0 where there is none.
        is_sum: whether the last axis is added up.
        sources: x and y, which are broadcast.
    """

    @staticmethod
    def forward(
        ctx: Any,
        table: Tensor,
        slopes: Tensor,
        step: Tensor,
        starts: Sequence[Tensor],
        sign: int,
        is_sum: bool,
        *sources: Tensor,
    ) -> Tensor:
        ctx.signs, ctx.is_sum = (1, sign)[: len(sources)], is_sum
        places = [
            torch.addcdiv(start, source, step, value=own).to(torch.int32)
            for start, source, own in zip(starts, sources, ctx.signs, strict=False)
        ]
        ctx.save_for_backward(slopes, *places)
        if not is_sum:
            return _taken(table, *places)
        found = (_taken(table, index) for _, index in _entries(places))
        return joined([x.sum(-1) if x.shape[-1] > 1 else x.squeeze(-1) for x in found])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slopes, *places = ctx.saved_tensors
        totals, moved = [], []
        for part, index in _entries(places) if ctx.is_sum else [(slice(None), places[0])]:
            given = grad[part]
            if ctx.is_sum:
                given = given.unsqueeze(-1).expand(index.shape)
            totals.append(_added(index, given, len(slopes)))
            change = _taken(slopes, index).mul_(given)
            moved.append([change.sum_to_size(own[part].shape) for own in places])
        gradients = [joined(parts) for parts in zip(*moved, strict=True)]
        if ctx.signs[-1] < 0:
            gradients[1] = gradients[1].neg()
        total = totals[0] if len(totals) == 1 else torch.stack(totals).sum(0)
        return total, *[None] * 5, *gradients


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors one behind the other, along their first axis; a single one is itself."""
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def _entries(places: Sequence[Tensor]) -> Iterable[tuple[slice, Tensor]]:
    """Sums of places of some samples at a time, few enough for a CPU's cache."""
    first = places[0]
    size = max(1, torch.broadcast_shapes(*(x.shape[1:] for x in places)).numel())
    some = max(1, PART // size) if first.device.type == "cpu" else len(first)
    for start in range(0, len(first), some):
        part = slice(start, start + some)
        x, *others = (own[part] for own in places)
        yield part, x + others[0] if others else x


def _in_memory(like: Tensor) -> list[int]:
    """The axes of a tensor as they lie in memory."""
    return sorted(range(like.dim()), key=like.stride, reverse=True)


def _taken(table: Tensor, index: Tensor) -> Tensor:
    """Entries of a table, in the memory order of their index."""
    order = _in_memory(index)
    index = index.permute(order)
    found = table.index_select(0, index.reshape(-1)).view(index.shape)
    return found.permute([order.index(axis) for axis in range(len(order))])


def _added(index: Tensor, values: Tensor, count: int) -> Tensor:
    """The sum of the values of each index, (count,): millions of values for a few entries."""
    order = _in_memory(index)
    index, values = (x.permute(order).reshape(-1) for x in (index, values))
    if values.device.type == "cpu":
        return torch.bincount(index, values, count).to(values.dtype)
    return spread(index, values, count)


def spread(index: Tensor, values: Tensor, count: int) -> Tensor:
    """The same on a GPU, which adds in memory, where additions to one place wait for each other: to
    many copies of the entries instead. (Its bincount reads the index first, for which the host
    would wait.)
    """
    most = max(1, _PLACES // count)
    copies = next(n for n in range(min(most, len(index)), 0, -1) if len(index) % n == 0)
    sums = torch.zeros(count, copies, dtype=values.dtype, device=values.device)
    index, values = (x.view(-1, copies) for x in (index, values))
    return sums.scatter_add_(0, index.long(), values).sum(1)
