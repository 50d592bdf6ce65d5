"""Piecewise-linear functions of numbers on a grid as tables: the same values and gradients.

Between the grid of what a layer computed and that of what the next one reads, a function in
segments is a dozen steps for each of its segments. Each number becomes another one on its own, by a
function that its channel has; and the grid has no more than 256 levels. So the steps are run on
the levels, and what is computed is looked up. The gradients that the numbers of one level receive
are added up and go through the steps once.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from archnet.ops.graph import Step
from archnet.ops.operators import Activation, Segments
from archnet.ops.piece import Piece

_PLACES = 2**18  # numbers in which a GPU adds up what belongs to the entries of a table
_LARGEST = 2**22  # entries of a table that are told apart by half a step in single precision


class Tabled(Piece):
    """Segments of a map, what rounds them, the layer that adds them, and what rounds the sum.

    Args:
        steps: these, in order; the last one may be missing.
        place: the activation that rounds what the segments read.
    """

    def __init__(self, steps: Sequence[Step], place: str) -> None:
        super().__init__((steps[-1].name,), steps[0].inputs)
        self.steps, self.place = tuple(steps), place

    def work(self, operators: nn.ModuleDict, live: Mapping[str, Tensor]) -> Sequence[Tensor]:
        x = live[self.reads[0]]
        # A grid has more levels than half precision tells apart.
        with torch.autocast(x.device.type, enabled=False):
            quantizer: Any = cast(Activation, operators[self.place]).quantizer
            if quantizer is not None:
                levels = (quantizer.high - quantizer.low + 1) * x.shape[1]
                if 2 * levels <= x.numel() and levels <= _LARGEST:
                    return [self._looked_up(operators, x, quantizer)]
            segments = cast(Segments, operators[self.steps[0].name])
            return [self._run(operators, x.to(segments.weight.dtype), x[0].numel())]

    def _run(self, operators: nn.ModuleDict, x: Tensor, values: int) -> Tensor:
        """The steps one after another, of which a sample has so many ``values``."""
        for step in self.steps:
            module = operators[step.name]
            if isinstance(module, Activation):
                x = module(
                    x,
                    values * (x.shape[1] // cast(Segments, operators[self.steps[0].name]).channels),
                )
            else:
                x = module(x)
        return x

    def _looked_up(self, operators: nn.ModuleDict, x: Tensor, quantizer: Any) -> Tensor:
        trains, channels = torch.is_grad_enabled(), x.shape[1]
        levels = quantizer.high - quantizer.low + 1
        step = quantizer.scale.detach()
        numbers = torch.arange(quantizer.low, quantizer.high + 1, device=x.device)
        # A map whose pixels are the levels.
        places = (numbers * step).expand(channels, levels)[None, ..., None].contiguous()
        places.requires_grad_(trains)
        results = self._run(operators, places, x[0].numel())
        slopes = results
        if trains:
            (slopes,) = torch.autograd.grad(results.sum(), places, retain_graph=True)
        first = torch.arange(channels, device=x.device) * levels - quantizer.low
        shape = (channels, *[1] * (x.dim() - 2))
        tables = results.flatten(), slopes.flatten()
        return cast(Tensor, _Lookup.apply(x, *tables, step, first.reshape(shape)))


class _Lookup(torch.autograd.Function):
    """Entry first + x / step of a table for every x; ``slopes`` are what entries change with x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, table: Tensor, slopes: Tensor, step: Tensor, first: Tensor
    ) -> Tensor:
        # Half a step more, so that the whole part is the nearest level.
        index = torch.addcmul(first + 0.5, x.float(), 1 / step.float()).to(torch.int32)
        order = sorted(range(index.dim()), key=index.stride, reverse=True)
        ctx.order, ctx.back = order, [order.index(axis) for axis in range(index.dim())]
        index = index.permute(order)
        ctx.save_for_backward(index, slopes)
        return table.index_select(0, index.reshape(-1)).view(index.shape).permute(ctx.back)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, slopes = ctx.saved_tensors
        flat, given = index.reshape(-1), grad.permute(ctx.order).reshape(-1)
        moved = slopes.index_select(0, flat).mul_(given)
        total = added(flat, given, len(slopes))
        return moved.view(index.shape).permute(ctx.back), total, None, None, None


def added(index: Tensor, values: Tensor, count: int) -> Tensor:
    """The sum of the values of each index, (count,): millions of values for a few entries."""
    if values.device.type == "cpu":
        return torch.bincount(index, values, count).to(values.dtype)
    # A GPU adds in memory, where additions to one place wait for each other: to many copies of
    # the entries instead. (Its bincount reads the index first, for which the host would wait.)
    copies = max(1, _PLACES // count)
    copy = torch.arange(len(index), device=index.device, dtype=index.dtype) % copies
    sums = torch.zeros(copies * count, dtype=values.dtype, device=values.device)
    return sums.index_add_(0, copy * count + index, values).view(copies, count).sum(0)
