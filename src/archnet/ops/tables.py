"""Functions of one number on a grid as tables: the same values and gradients in far fewer passes.

Between the grid of what a layer computed and that of what the next one reads, an activation by
hinges is a dozen steps (norms, clips, roundings, a constant layer that adds). Each number becomes
another one on its own, by a function that its channel has; and the grid has no more than 256
levels. So the steps are run on the levels, and what is computed is looked up. The gradients that
the numbers of one level receive are added up and go through the steps once.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from archnet.ops.graph import Step
from archnet.ops.layout import LayoutMove, Pad
from archnet.ops.operators import Activation, BatchNorm, Concat, FullyConnected
from archnet.ops.piece import Piece

_PLACES = 2**18  # numbers in which a GPU adds up what belongs to the entries of a table
_LARGEST = 2**22  # entries of a table that are told apart by half a step in single precision


@dataclass(frozen=True)
class _Function:
    """Steps between a value on a grid and a later one that treat every number alone.

    Attributes:
        steps: all of them, in order; the last one is the activation that rounds the result.
        source: the value before them.
        places: the activations that round the source.
        shape: of the source, for one sample.
        axis: of them, along which functions differ, counted without the batch.
        place: for every number of a sample of the source where it is in the result, flat.
        order: of the source's axes, counted with the batch, that makes it the result but for a
            reshape.
    """

    steps: tuple[Step, ...]
    source: str
    places: tuple[str, ...]
    shape: tuple[int, ...]
    axis: int
    place: Tensor
    order: tuple[int, ...]


class Tabled(Piece):
    """A `_Function` looked up in a table, where its source lies on a grid."""

    def __init__(self, function: _Function) -> None:
        super().__init__((function.steps[-1].name,), (function.source,))
        self.function = function
        self._place = function.place

    def work(self, operators: nn.ModuleDict, live: Mapping[str, Tensor]) -> Sequence[Tensor]:
        x = live[self.reads[0]]
        # A grid has more levels than half precision tells apart.
        with torch.autocast(x.device.type, enabled=False):
            return [self._worked(operators, x)]

    def _worked(self, operators: nn.ModuleDict, x: Tensor) -> Tensor:
        function = self.function
        found = [cast(Activation, operators[name]).quantizer for name in function.places]
        quantizer: Any = found[0] if all(item is found[0] for item in found) else None
        numbers, channels = math.prod(function.shape), function.shape[function.axis]
        # Sentences are as long as they are, whatever length their student was measured with.
        if quantizer is not None and tuple(x.shape[1:]) == function.shape:
            levels = quantizer.high - quantizer.low + 1
            samples = -(-levels * channels // numbers)
            if 2 * samples <= len(x) and levels * channels <= _LARGEST:
                return self._looked_up(operators, x, quantizer, samples)
        parameters = (p for step in function.steps for p in operators[step.name].parameters())
        dtype = next((parameter.dtype for parameter in parameters), x.dtype)
        return self._run(operators, x.to(dtype))

    def _run(self, operators: nn.ModuleDict, x: Tensor) -> Tensor:
        found = {self.function.source: x}
        for step in self.function.steps:
            found[step.name] = operators[step.name](*[found[name] for name in step.inputs])
        return found[self.function.steps[-1].name]

    def _looked_up(
        self, operators: nn.ModuleDict, x: Tensor, quantizer: Any, samples: int
    ) -> Tensor:
        function, trains = self.function, torch.is_grad_enabled()
        axis, channels = function.axis, function.shape[function.axis]
        levels = quantizer.high - quantizer.low + 1
        step = quantizer.scale.detach()
        # Samples that hold all levels of every channel.
        others = [size for index, size in enumerate(function.shape) if index != axis]
        numbers = torch.arange(samples * math.prod(others), device=x.device)
        grid = (numbers.clamp_max(levels - 1) + quantizer.low) * step
        places = grid.reshape(samples, *others).unsqueeze(axis + 1)
        places = places.expand(samples, *function.shape).contiguous().requires_grad_(trains)

        def entries(values: Tensor) -> Tensor:
            rows = values.reshape(samples, *function.shape).movedim(axis + 1, 0)
            return rows.reshape(channels, -1)[:, :levels].flatten()

        results = self._run(operators, places)
        # Kept where it is read: the host waits for what it sends.
        self._place = self._place.to(x.device)
        table = entries(results.flatten(1).index_select(1, self._place))
        slopes = table
        if trains:
            (slopes,) = torch.autograd.grad(results.sum(), places, retain_graph=True)
            slopes = entries(slopes)
        first = torch.arange(channels, device=x.device) * levels - quantizer.low
        shape = [1] * (x.dim() - 1)
        shape[axis] = channels
        found = _Lookup.apply(x, table, slopes, step, first.reshape(shape))
        moved = cast(Tensor, found).permute(function.order)
        return moved.reshape(len(x), *results.shape[1:])


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


# Finding them ---------------------------------------------------------------------------------


def functions_of_levels(
    steps: Sequence[Step], operators: nn.ModuleDict, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tabled]:
    """What constant layers, or else norms, make of single numbers, by the activation behind."""
    by_name = {step.name: step for step in steps}
    found: dict[str, Tabled] = {}
    inside: set[str] = set()
    for kind in (FullyConnected, BatchNorm):
        for step in steps:
            if step.name in inside or not isinstance(operators[step.name], Activation):
                continue
            before = _computed(step, by_name, operators)
            if isinstance(before, kind) and _alone(before):
                function = _function(step, by_name, operators, shapes)
                if function is not None:
                    found[step.name] = Tabled(function)
                    inside.update(member.name for member in function.steps)
    return found


def _alone(module: nn.Module) -> bool:
    """Whether an operator may treat every number alone, by what its channel says."""
    if isinstance(module, FullyConnected):
        return not module.trainable
    passes = isinstance(module, LayoutMove) and not isinstance(module, Pad)
    return passes or isinstance(module, BatchNorm | Concat | Activation)


def _function(
    end: Step,
    by_name: Mapping[str, Step],
    operators: nn.ModuleDict,
    shapes: Mapping[str, tuple[int, ...]],
) -> _Function | None:
    """The function that ends with the activation ``end``; None where it is none."""
    source = _source(end, by_name, operators)
    if source is None:
        return None
    shape, members = shapes[source], _behind(source, end, by_name)
    steps = tuple(step for name, step in by_name.items() if name in members)
    index = torch.arange(math.prod(shape), dtype=torch.int32).view(1, *shape)
    numbers = {source: index}
    # What decides which function a number has: the channel of a norm, the row of a layer.
    rulers: list[tuple[Tensor, Tensor]] = []
    for step in steps:
        reads, module = [numbers[name] for name in step.inputs], operators[step.name]
        if isinstance(module, BatchNorm):
            channels = torch.arange(module.channels).view(-1, *[1] * (reads[0].dim() - 2))
            rulers.append((reads[0], channels.expand_as(reads[0])))
            numbers[step.name] = reads[0]
        elif isinstance(module, FullyConnected):
            of_rows = _rows(module, reads[0])
            if of_rows is None:
                return None
            rulers.append((of_rows, torch.arange(module.out_features).expand_as(of_rows)))
            numbers[step.name] = of_rows
        else:
            numbers[step.name] = reads[0] if isinstance(module, Activation) else module(*reads)
    order = _order(index, numbers[end.name])
    axis = _axis(shape, rulers)
    if order is None or axis is None:
        return None
    place = torch.empty(index.numel(), dtype=torch.long)
    place[numbers[end.name].flatten().long()] = torch.arange(index.numel())
    places = _grids(source, by_name, operators)
    return _Function(steps, source, tuple(sorted(places)), shape, axis, place, order)


def _source(end: Step, by_name: Mapping[str, Step], operators: nn.ModuleDict) -> str | None:
    """The last value on a grid through which all goes that arrives at ``end``."""
    region: dict[str, None] = {}
    open_ = list(end.inputs)
    while open_:
        name = open_.pop()
        if name not in by_name or not _alone(operators[name]):
            return None
        if name not in region:
            region[name] = None
            if not _is_place(by_name[name], by_name, operators):
                open_.extend(by_name[name].inputs)
    for name in reversed([name for name in by_name if name in region]):
        if _grids(name, by_name, operators):
            behind = _behind(name, end, by_name, region)
            others = (by_name[inner] for inner in behind - {end.name})
            if not any(_is_place(step, by_name, operators) for step in others):
                return name
    return None


def _is_place(step: Step, by_name: Mapping[str, Step], operators: nn.ModuleDict) -> bool:
    """Whether a step is an activation of something else than a norm."""
    if not isinstance(operators[step.name], Activation):
        return False
    return not isinstance(_computed(step, by_name, operators), BatchNorm)


def _computed(
    step: Step, by_name: Mapping[str, Step], operators: nn.ModuleDict
) -> nn.Module | None:
    """The operator whose result arrives, only moved, at a step; None where none is known."""
    name = step.inputs[0]
    while name in by_name and isinstance(operators[name], LayoutMove):
        (name,) = by_name[name].inputs
    return operators[name] if name in by_name else None


def _grids(name: str, by_name: Mapping[str, Step], operators: nn.ModuleDict) -> set[str]:
    """The activations whose values arrive at ``name`` only moved; none if others do as well."""
    if name not in by_name or not _alone(operators[name]):
        return set()
    module, step = operators[name], by_name[name]
    if isinstance(module, Activation):
        return {name} if _is_place(step, by_name, operators) else set()
    if not isinstance(module, LayoutMove | Concat):
        return set()
    found = [_grids(before, by_name, operators) for before in step.inputs]
    return set().union(*found) if all(found) else set()


def _behind(
    source: str, end: Step, by_name: Mapping[str, Step], within: Iterable[str] = ()
) -> set[str]:
    """The steps from which ``end`` follows, back to ``source``."""
    found, open_ = set(), [end.name]
    limits = set(within)
    while open_:
        name = open_.pop()
        if name == source or name in found or (limits and name not in {*limits, end.name}):
            continue
        found.add(name)
        open_.extend(by_name[name].inputs)
    return found


def _rows(layer: FullyConnected, numbers: Tensor) -> Tensor | None:
    """Which number each output of a layer is made of, (1, ..., O); None if of several."""
    # Plans are made of numbers on the CPU, wherever the student is.
    rows, columns = (layer.weight.detach().cpu() != 0).nonzero(as_tuple=True)
    if len(rows.unique()) != layer.out_features:
        return None
    first = torch.zeros(layer.out_features, dtype=torch.long)
    # The last writer of a row wins; which one does not matter.
    first[rows] = columns
    alike = torch.equal(numbers[..., columns], numbers[..., first[rows]])
    return numbers[..., first] if alike else None


def _order(numbers: Tensor, result: Tensor) -> tuple[int, ...] | None:
    """The order of axes that makes ``numbers`` the result, but for a reshape."""
    if numbers.numel() != result.numel():
        return None
    for order in itertools.permutations(range(1, numbers.dim())):
        if torch.equal(numbers.permute(0, *order).reshape(result.shape), result):
            return (0, *order)
    return None


def _axis(shape: tuple[int, ...], rulers: Sequence[tuple[Tensor, Tensor]]) -> int | None:
    """The axis whose coordinate decides all that the rulers hold for a number."""
    behind = math.prod(shape)
    for axis, size in enumerate(shape):
        behind //= size
        if all(_decides(size, behind, numbers, values) for numbers, values in rulers):
            return axis
    return None


def _decides(size: int, behind: int, numbers: Tensor, values: Tensor) -> bool:
    where, values = (numbers // behind % size).flatten().long(), values.flatten()
    one = torch.zeros(size, dtype=values.dtype).scatter_(0, where, values)
    return torch.equal(one[where], values)
