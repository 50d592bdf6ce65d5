"""Channels of one value brought to one size before a narrow grid, by a batch norm.

One scale serves all channels of an activation, so that at 4 bits a channel a fifteenth as large as
the largest one is rounded to zero. A batch norm on the finer grid of what was computed (it is no
trained layer, `quant.sum_bits`) divides every channel by a size of its own; the layers behind it
multiply the columns of their weights by the same sizes. In floats nothing changes. It is the
equalization of Nagel et al. 2019 (arXiv 1906.04721) and SmoothQuant (Xiao et al. 2022, arXiv
2211.10438), but between any two operators: what is before needs not be linear, and its features
stay comparable with the teacher's.
"""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from archnet.ops import (
    BatchNorm,
    Convolution,
    FullyConnected,
    LayoutMove,
    Operator,
    Permute,
    Step,
    Student,
    WeightedOperator,
)
from archnet.quant.attach import QuantizationError, describe, multiplies
from archnet.quant.calibrate import SAMPLES, best_scale, lowest_level, observe_channels
from archnet.quant.quantizers import signed_range
from archnet.quant.recipe import Recipe
from archnet.quant.widths import FLOAT, first_and_last

EXPONENTS = (0.25, 0.5, 0.75, 1.0)  # of a channel's size, tried besides 0 (Lin et al. 2306.00978)
WORTH = 0.5  # of the error without it: a batch norm costs the chip something
ROWS = 64  # outputs of a layer whose weights are looked at
SMALLEST = 1 / 64  # of the largest channel; a channel that is silent on the samples is no larger


@dataclass(frozen=True)
class _Place:
    """A value and the trained layers that read it through layout moves alone.

    ``channels`` says for each reader which channel of the value every column of its weight
    multiplies, (O, I) or (1, I) where that is the same for all rows; ``axis`` is that of the
    channels, counted with the batch as axis 0.
    """

    value: str
    axis: int
    channels: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Grid:
    """The grid that all channels of a value are going to share."""

    bits: int
    power_of_two: bool
    zero_points: bool

    def lows(self, samples: Tensor) -> list[int]:
        """Where the grid that a channel is measured by may begin."""
        if not bool((samples < 0).any()):
            return [0]
        symmetric = signed_range(self.bits)[0]
        if not self.zero_points:
            return [symmetric]
        return sorted({symmetric, -(-symmetric // 2), -(-symmetric // 4)})

    def error(self, samples: Tensor) -> Tensor:
        """Mean squared error of every channel of (C, N) on the grid that suits all, (C,)."""
        flat = samples.flatten()[:: max(1, samples.numel() // SAMPLES)]
        low = lowest_level(flat, self.bits, self.power_of_two, self.zero_points)
        high = low + 2**self.bits - 1
        scale = best_scale(flat[None], low, high, self.power_of_two)
        rounded = (samples / scale).round().clamp(low, high) * scale
        return (rounded - samples).square().mean(1)


def equalize(
    student: Student, recipe: Recipe, calibration: Iterable[Tensor | tuple[Tensor, ...]]
) -> list[str]:
    """Put batch norms where they lessen what rounding to so few bits costs, in place.

    For every value that trained layers multiply, the squared error at their outputs is estimated
    from samples: that of the rounded activations under the squared weights, and that of the
    rounded weights under the squared activations. Sizes are the channels' best scales to the power
    that makes it least; a batch norm is put where this is less than half of what it was. The first
    and the last layer have widths of their own and are left alone.

    Args:
        student: float, not quantized. It computes the same as before.
        recipe: how it is going to be quantized.
        calibration: unlabelled batches (B, C, H, W), or tuples of all inputs of the student.

    Returns:
        The values that are equalized, in order.

    Raises:
        QuantizationError: the student is quantized already.
    """
    if describe(student):
        raise QuantizationError("the student is quantized already; equalize it before")
    recipe = recipe.on(student)
    if recipe.act_bits == FLOAT:
        return []
    places = _places(student)
    samples = observe_channels(student, {p.value: p.axis for p in places}, calibration)
    found = []
    for place in places:
        layers = {name: student.operator(name) for name in place.channels}
        columns = [_columns(layers[name], place.channels[name]) for name in layers]
        grid = _Grid(recipe.act_bits, recipe.acts_in_powers, bool(recipe.zero_points))
        sizes = _sizes(samples[place.value], columns, recipe.weight_bits, grid)
        if sizes is not None:
            found.append((place, sizes))
    for place, sizes in found:
        _divide(student, place, sizes)
    return [place.value for place, _ in found]


def _places(student: Student) -> list[_Place]:
    by_name = {step.name: step for step in student.graph.steps}
    first, last, _ = first_and_last(student)
    ends = {*first, *last}
    readers: dict[str, list[str]] = {}
    chains: dict[str, list[str]] = {}
    for step in student.graph.steps:
        if multiplies(student.operator(step.name)):
            for name in step.inputs:
                chain = [name]
                while chain[-1] in by_name and isinstance(student.operator(chain[-1]), LayoutMove):
                    chain += by_name[chain[-1]].inputs
                readers.setdefault(chain[-1], []).append(step.name)
                chains[step.name] = chain[::-1]
    found = []
    for names in readers.values():
        modules = [student.operator(name) for name in names]
        plain = all(isinstance(module, Convolution | FullyConnected) for module in modules)
        if plain and not ends & set(names):
            place = _place(student, {name: chains[name] for name in names})
            found += [place] if place is not None else []
    return found


def _place(student: Student, chains: Mapping[str, Sequence[str]]) -> _Place | None:
    """Where the chains from one value to its readers can be equalized: the first value that they
    have in common and whose channels each column of the readers belongs to one of.
    """
    shortest = min(len(chain) for chain in chains.values())
    common = [
        value
        for index, value in enumerate(next(iter(chains.values()))[:shortest])
        if all(chain[index] == value for chain in chains.values())
    ]
    for last in (False, True):
        for value in common:
            shape = student.graph.shapes.get(value, ())
            axis = len(shape) if last else 1
            if value in student.graph.inputs or not shape:
                continue
            channels = {
                name: _channels(student, value, axis, chain[-1], student.operator(name))
                for name, chain in chains.items()
            }
            if all(found is not None for found in channels.values()):
                known = {name: found for name, found in channels.items() if found is not None}
                return _Place(value, axis, known)
    return None


def _channels(
    student: Student, value: str, axis: int, read: str, module: Operator
) -> Tensor | None:
    """Which channel of ``value`` each column of a layer's weight multiplies, (O, I) or (1, I);
    None if one column meets several.
    """
    shape = student.graph.shapes[value]
    sizes = [1] * (len(shape) + 1)
    sizes[axis] = shape[axis - 1]
    # From one on: what a layout move fills in is zero.
    marks = torch.arange(1.0, shape[axis - 1] + 1).reshape(sizes).expand(1, *shape).clone()
    (seen,) = student.run({value: marks}, [read])
    rows = seen.movedim(1 if isinstance(module, Convolution) else -1, 0).flatten(1)
    highest = rows.amax(1)
    lowest = torch.where(rows > 0, rows, math.inf).amin(1)
    if not bool((highest == lowest).all()):
        return None
    return (highest.long() - 1)[columns_read(module)]


def columns_read(module: Operator) -> Tensor:
    """Which channel of what a layer reads each column of its weight multiplies: (O, I), or (1, I)
    where all rows read the same.
    """
    assert isinstance(module, WeightedOperator)
    columns = module.weight.shape[1]
    if not isinstance(module, Convolution) or module.groups == 1:
        return torch.arange(columns)[None]
    # The layer's input is (copies, groups, channels of a group), a row's columns are those of its
    # group.
    copies, groups = module.copies, module.groups
    channels = torch.arange(columns * groups).reshape(copies, groups, -1)
    return channels.transpose(0, 1).flatten(1).repeat_interleave(module.out_channels // groups, 0)


def _columns(module: Operator, channels: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (O, I, K) of a layer, of `ROWS` outputs, with the channel of each column, (O, I) or
    (1, I).
    """
    assert isinstance(module, WeightedOperator)
    step = -(-len(module.weight) // ROWS)
    weight = module.weight.detach()[::step].float().cpu()
    return weight.reshape(*weight.shape[:2], -1), channels[::step]


def _sizes(
    samples: Tensor,
    columns: Sequence[tuple[Tensor, Tensor]],
    weight_bits: int,
    grid: _Grid,
) -> Tensor | None:
    """The size of every channel, (C,), geometric mean 1; None where it is not worth it."""
    power = samples.square().mean(1).clamp_min(1e-12)
    # What is behind an output measures it by its own size: errors count relative to that.
    layers = []
    for weight, channels in columns:
        size = (weight.square().sum(2) * power[channels]).sum(1).clamp_min(1e-12).sqrt()
        layers.append((weight / size[:, None, None], channels))
    best, least = None, math.inf
    for low in grid.lows(samples):
        own = best_scale(samples, low, low + 2**grid.bits - 1)
        own = own.clamp_min(float(own.max()) * SMALLEST)
        for exponent in (0.0, *EXPONENTS):
            sizes = own.log().mul(exponent)
            sizes = (sizes - sizes.mean()).exp()
            error = grid.error(samples / sizes[:, None]) * sizes.square()
            total = 0.0
            for weight, channels in layers:
                factor = sizes[channels][..., None]
                total += float((weight.square().sum(2) * error[channels]).sum())
                if weight_bits != FLOAT:
                    wrong = _weights_rounded(weight * factor, weight_bits, grid.power_of_two)
                    total += float((wrong / factor.square() * power[channels][..., None]).sum())
            if best is None and exponent == 0:
                least = WORTH * total
            elif exponent and total < least:
                best, least = sizes, total
    return best


def _weights_rounded(weight: Tensor, bits: int, power_of_two: bool) -> Tensor:
    """Squared error of every weight (O, I, K) on the grid of its output channel."""
    rows = weight.flatten(1)
    low, high = signed_range(bits)
    scale = best_scale(rows, low, high, power_of_two)[:, None, None]
    return ((weight / scale).round().clamp(low, high) * scale - weight).square()


def _divide(student: Student, place: _Place, sizes: Tensor) -> None:
    """Divide the channels of a value by their sizes and multiply its readers' columns by them.

    A norm that is there for these readers alone divides; else one is put. Layout moves on the way
    to the readers are made anew: an addition may read the old ones.
    """
    for name, channels in place.channels.items():
        reader = student.operator(name)
        assert isinstance(reader, WeightedOperator)
        with torch.no_grad():
            columns = sizes[channels].reshape(*channels.shape, *[1] * (reader.weight.dim() - 2))
            reader.weight.mul_(columns.to(reader.weight))
    by_name = {step.name: step for step in student.graph.steps}
    before = student.operator(place.value) if place.value in by_name else None
    if isinstance(before, BatchNorm) and place.axis == 1 and _serves(student, place):
        with torch.no_grad():
            before.weight.div_(sizes.to(before.weight))
            before.bias.div_(sizes.to(before.bias))
        return
    module = BatchNorm(len(sizes), eps=1e-5).to(next(student.parameters()))
    with torch.no_grad():
        module.weight.copy_(1 / sizes)
        module.running_var.fill_(1 - module.eps)
    rank = len(student.graph.shapes[place.value]) + 1
    work = norm_along(f"{place.value}_equal", module, place.axis, rank)
    added: dict[str, Operator] = {}
    steps: list[Step] = []

    def put(name: str, source: str, operator: Operator, origin: str) -> str:
        if name not in added:
            added[name] = operator
            steps.append(Step(name, (source,), origin))
        return name

    def equal(name: str, origin: str) -> str:
        if name == place.value:
            for made, operator in work.items():
                name = put(made, name, operator, origin)
            return name
        (source,) = by_name[name].inputs
        move = student.operator(name)
        return put(f"{name}_equal", equal(source, origin), copy.deepcopy(move), origin)

    for step in student.graph.steps:
        inputs = step.inputs
        if step.name in place.channels:
            inputs = tuple(equal(name, step.origin) for name in inputs)
        steps.append(Step(step.name, inputs, step.origin))
    student.rewire(steps, added=added)
    student.drop_unread()


def norm_along(name: str, norm: BatchNorm, axis: int, rank: int) -> dict[str, Operator]:
    """A batch norm on the first or the last axis of a value, by step: one after another.

    ``axis`` and ``rank`` count the batch; where channels are last they are first meanwhile.
    """
    if axis == 1:
        return {name: norm}
    return {
        f"{name}_first": Permute((0, rank - 1, *range(1, rank - 1))),
        name: norm,
        f"{name}_last": Permute((0, *range(2, rank), 1)),
    }


def _serves(student: Student, place: _Place) -> bool:
    """Whether a value is there for the readers of its place alone."""
    consumers, open_ = student.consumers(), [place.value]
    kept = {*student.graph.outputs, *(tap.value for tap in student.taps)}
    while open_:
        name = open_.pop()
        if name in kept:
            return False
        for step in consumers.get(name, []):
            if isinstance(student.operator(step.name), LayoutMove):
                open_.append(step.name)
            elif step.name not in place.channels:
                return False
    return True
