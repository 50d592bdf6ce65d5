"""Hinges of sums as one function: the same values and gradients without the hinges."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from archnet.ops.graph import Step
from archnet.ops.layout import Reshape
from archnet.ops.operators import Activation, Concat, FullyConnected
from archnet.ops.piece import Piece, place_of
from archnet.ops.tables import added

_PART = 2**17  # sums taken at a time on a CPU


class Copied(Piece):
    """A value of size one on ``axis`` that is concatenated with itself: a view."""

    def __init__(self, step: Step, axis: int) -> None:
        super().__init__((step.name,), step.inputs[:1])
        self.axis, self.count = axis, len(step.inputs)

    def work(self, operators: nn.ModuleDict, live: Mapping[str, Tensor]) -> Sequence[Tensor]:
        x = live[self.reads[0]]
        return [x.expand(*x.shape[: self.axis], self.count, *x.shape[self.axis + 1 :])]


def copies(
    steps: Sequence[Step], operators: nn.ModuleDict, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Copied]:
    """Concatenations of one value with itself, by name."""
    found = {}
    for step in steps:
        module, source = operators[step.name], step.inputs[0]
        if not isinstance(module, Concat) or set(step.inputs) != {source}:
            continue
        if len(step.inputs) > 1 and shapes[source][module.axis - 1] == 1:
            found[step.name] = Copied(step, module.axis)
    return found


@dataclass(frozen=True)
class _Hinges:
    """Steps that compute sum_k o_k max(w_k z + b_k, 0), added over neighbours, z a sum of sources.

    Attributes:
        steps: all of them, in order.
        lines, act, total: the three that compute.
        sources: what is added in z, (..., 1) each, with ``signs``.
        places: the activations that round the sources; None where one cannot be told.
        shape: of the result.
    """

    steps: tuple[Step, ...]
    lines: str
    act: str
    total: str
    sources: tuple[str, ...]
    signs: tuple[float, ...]
    places: tuple[str, ...] | None
    shape: tuple[int, ...]


class Bent(Piece):
    """`_Hinges` as one function of z: piecewise linear, or a table where z lies on a grid."""

    def __init__(self, hinges: _Hinges) -> None:
        super().__init__((hinges.total,), hinges.sources)
        self.hinges = hinges

    def work(self, operators: nn.ModuleDict, live: Mapping[str, Tensor]) -> Sequence[Tensor]:
        # A grid has more levels than half precision tells apart.
        with torch.autocast(live[self.reads[0]].device.type, enabled=False):
            return [self._worked(operators, live)]

    def _worked(self, operators: nn.ModuleDict, live: Mapping[str, Tensor]) -> Tensor:
        hinges = self.hinges
        lines, act, total = (operators[n] for n in (hinges.lines, hinges.act, hinges.total))
        assert isinstance(lines, FullyConnected)
        assert isinstance(act, Activation)
        assert isinstance(total, FullyConnected)
        grid = self._grid(operators)
        on_grid = lines.weight_quantizer is not None or total.weight_quantizer is not None
        if (grid is None) if act.quantizer is not None else on_grid:
            return self._by_steps(operators, live)
        weight, bias = lines.parameters_on_grid()
        sources = [live[name].squeeze(-1).to(weight.dtype) for name in hinges.sources]
        sign = hinges.signs[-1] if len(sources) > 1 else 0.0
        outer, offset = total.parameters_on_grid()
        layers = (weight[:, 0], bias, outer[0, : len(bias)])
        where = (sources[0], sources[-1], sign, hinges.shape[:-1])
        if act.quantizer is None:
            bent = _Line.apply(*where, *layers)
        else:
            bent = _Table.apply(*where, *self._table(sources[0], grid, act, layers))
        return cast(Tensor, bent + offset).unsqueeze(-1)

    def _grid(self, operators: nn.ModuleDict) -> Any:
        """The quantizer that all sources share, if there is one."""
        if self.hinges.places is None:
            return None
        found = [cast(Activation, operators[name]).quantizer for name in self.hinges.places]
        return found[0] if all(item is found[0] for item in found) else None

    def _table(
        self, x: Tensor, grid: Any, act: Activation, layers: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """What comes of every z on the grid, how it changes with z, the grid's step and start."""
        row, bias, outer = layers
        step = grid.scale.detach().to(x)
        ends = [(sign * grid.low, sign * grid.high) for sign in self.hinges.signs]
        low, high = (int(sum(pick(pair) for pair in ends)) for pick in (min, max))
        places = torch.arange(low, high + 1, device=x.device) * step
        places.requires_grad_(torch.is_grad_enabled())
        # Rounded as they would be one by one, with the gradient that many would have.
        table = act(places[:, None] * row + bias, x[0].numel() * len(row)) @ outer
        slopes = places
        if places.requires_grad:
            (slopes,) = torch.autograd.grad(table.sum(), places, retain_graph=True)
        return table, slopes, step, low

    def _by_steps(self, operators: nn.ModuleDict, live: Mapping[str, Tensor]) -> Tensor:
        dtype = cast(FullyConnected, operators[self.hinges.lines]).weight.dtype
        found = {name: live[name].to(dtype) for name in self.reads}
        for step in self.hinges.steps:
            found[step.name] = operators[step.name](*[found[name] for name in step.inputs])
        return found[self.hinges.total]


def _sums(first: Tensor, second: Tensor, sign: float) -> Iterable[tuple[slice, Tensor]]:
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


def _spread(grad: Tensor, z: Tensor) -> Tensor:
    """What is given to a sum, for every value that was added: of z's shape."""
    flat = grad.reshape(len(grad), -1, 1)
    return flat.expand(*flat.shape[:2], z[0].numel() // flat.shape[1]).reshape(z.shape)


class _Line(torch.autograd.Function):
    """sum_k o_k max(w_k z + b_k, 0), added over neighbours: (B, *shape).

    With t_k = -b_k / w_k and a_k = o_k |w_k| that is the sum of a_k (max(z, t_k) - t_k) where
    w_k > 0, and of a_k (max(z, t_k) - z) where w_k < 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        first: Tensor,
        second: Tensor,
        sign: float,
        shape: tuple[int, ...],
        row: Tensor,
        bias: Tensor,
        outer: Tensor,
    ) -> Tensor:
        knots, sizes = -bias / row, outer * row.abs()
        ctx.bends = list(zip(knots.tolist(), sizes.tolist(), strict=True))
        ctx.slope = -float(sizes[row < 0].sum())
        start = -float((sizes * knots)[row > 0].sum())
        ctx.sign = sign
        ctx.save_for_backward(first, second)
        result = torch.empty((len(first), *shape), dtype=first.dtype, device=first.device)
        for part, z in _sums(first, second, sign):
            total = (ctx.slope * z).add_(start)
            for t, a in ctx.bends:
                total.add_(z.clamp_min(t), alpha=a)
            result[part] = total.reshape(len(z), *shape, -1).sum(-1)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, second = ctx.saved_tensors
        moved = torch.empty(first.shape, dtype=grad.dtype, device=grad.device)
        for part, z in _sums(first, second, ctx.sign):
            given = _spread(grad[part], z)
            total = ctx.slope * given
            for t, a in ctx.bends:
                total.add_(torch.ops.aten.threshold_backward(given, z, t), alpha=a)
            moved[part] = total
        return _shared(ctx, moved, 5)


class _Table(torch.autograd.Function):
    """Entries of a table for z on the grid step * (low, low + 1, ...), added over neighbours.

    ``slopes`` says what an entry changes with z; the table has a gradient of its own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        first: Tensor,
        second: Tensor,
        sign: float,
        shape: tuple[int, ...],
        table: Tensor,
        slopes: Tensor,
        step: Tensor,
        low: int,
    ) -> Tensor:
        ctx.sign, ctx.low = sign, low
        ctx.save_for_backward(first, second, slopes, step)
        result = torch.empty((len(first), *shape), dtype=table.dtype, device=first.device)
        for part, z in _sums(first, second, sign):
            found = table.index_select(0, _places(z, step, low, len(table)))
            result[part] = found.reshape(len(z), *shape, -1).sum(-1)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, second, slopes, step = ctx.saved_tensors
        moved = torch.empty(first.shape, dtype=grad.dtype, device=grad.device)
        total = torch.zeros_like(slopes)
        for part, z in _sums(first, second, ctx.sign):
            places = _places(z, step, ctx.low, len(slopes))
            given = _spread(grad[part], z)
            total += added(places, given.flatten(), len(slopes))
            moved[part] = given * slopes.index_select(0, places).reshape(z.shape)
        return (*_shared(ctx, moved, 2), total, None, None, None)


def _places(z: Tensor, step: Tensor, low: int, count: int) -> Tensor:
    """The entries of z in a table."""
    return (z / step).round_().sub_(low).clamp_(0, count - 1).to(torch.int32).flatten()


def _shared(ctx: Any, moved: Tensor, others: int) -> tuple[Tensor | None, ...]:
    """The gradients of both sources, and none for what follows them."""
    second = moved * ctx.sign if ctx.sign else None
    return (moved, second, *[None] * others)


def hinges_of_sums(
    steps: Sequence[Step], operators: nn.ModuleDict, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Bent]:
    """Constant layers that add hinges of a sum of values, by the name of the last step."""
    by_name = {step.name: step for step in steps}
    found = {}
    for step in steps:
        hinges = _found(step, by_name, operators, shapes)
        if hinges is not None:
            found[step.name] = Bent(hinges)
    return found


def _found(
    total: Step,
    by_name: Mapping[str, Step],
    operators: nn.ModuleDict,
    shapes: Mapping[str, tuple[int, ...]],
) -> _Hinges | None:
    chain = [total]

    def before(kind: type[nn.Module]) -> bool:
        """Whether the value in front is of a kind; then it belongs to the chain."""
        step = by_name.get(chain[-1].inputs[0])
        if step is None or not isinstance(operators[step.name], kind):
            return False
        chain.append(step)
        return True

    if not _is_constant(operators[total.name]):
        return None
    before(Reshape)
    if not before(Activation):
        return None
    act = chain[-1]
    if not before(FullyConnected) or not _is_constant(operators[chain[-1].name]):
        return None
    lines = chain[-1]
    bounds = operators[act.name]
    weight, outer = (cast(FullyConnected, operators[s.name]).weight for s in (lines, total))
    count = len(weight)
    if (bounds.low, bounds.high) != (0, math.inf) or not bool((weight[:, 0] != 0).all()):
        return None
    signs = weight[0] / weight[0, 0]
    repeated = outer.reshape(-1, count) if len(outer) == 1 and not outer.shape[1] % count else None
    if (
        repeated is None
        or not torch.equal(weight, weight[:, :1] * signs)
        or not bool((signs.abs() == 1).all())
        or not torch.equal(repeated, repeated[:1].expand_as(repeated))
    ):
        return None
    sources = lines.inputs
    if len(signs) > 1:
        if not before(Concat) or len(chain[-1].inputs) != len(signs):
            return None
        sources = chain[-1].inputs
    if any(shapes[name][-1] != 1 for name in sources):
        return None
    places = [place_of(name, by_name, operators) for name in sources]
    known = tuple(name for name in places if name is not None)
    return _Hinges(
        tuple(reversed(chain)),
        lines.name,
        act.name,
        total.name,
        tuple(sources),
        tuple(signs.tolist()),
        known if len(known) == len(places) else None,
        shapes[total.name],
    )


def _is_constant(module: nn.Module) -> bool:
    return isinstance(module, FullyConnected) and not module.trainable
