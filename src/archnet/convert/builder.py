"""Builds a student of whole operators; what a target makes of them is in `archnet.lower`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from archnet import ops
from archnet.convert.feature import Carry, Convolution, Feature, Form, Value, resized
from archnet.errors import ArchnetError
from archnet.ops import (
    Activation,
    Add,
    AddConstant,
    BatchNorm,
    Concat,
    FullyConnected,
    Function,
    Operator,
    Pad,
    Permute,
    Reshape,
    Segments,
    Slice,
    Step,
    StudentGraph,
)
from archnet.ops.native import FUNCTIONS
from archnet.ops.shapes import result_shape


def _move(axis: int, to: int, rank: int) -> tuple[int, ...]:
    """The order of axes that moves one of them; ``rank`` counts the batch."""
    order = [other for other in range(rank) if other != axis]
    order.insert(to, axis)
    return tuple(order)


Cut = tuple[int, int, int]  # an axis, and the first and last entry (exclusive) taken of it


def cut_before(move: Permute | Reshape, cut: Cut, shape: tuple[int, ...]) -> Cut | None:
    """The cut of what a move reads, of ``shape``, that becomes a cut of its result; None where it
    is none along one axis.
    """
    axis, start, stop = cut
    if isinstance(move, Permute):
        return move.order[axis], start, stop
    block = math.prod(move.shape[axis - 1 :])
    inner = math.prod(move.shape[axis:])
    for other, size in enumerate(shape, 1):
        step = math.prod(shape[other:])
        ends = (start * inner, stop * inner)
        if size > 1 and size * step == block and not any(end % step for end in ends):
            return other, ends[0] // step, ends[1] // step
    return None


def _narrowed(move: Permute | Reshape, cut: Cut) -> Operator:
    """A move that gives a cut of what it gave."""
    if isinstance(move, Permute):
        return move
    axis, start, stop = cut
    return Reshape((*move.shape[: axis - 1], stop - start, *move.shape[axis:]))


class ConversionError(ArchnetError):
    """The teacher cannot be converted for this target."""


class TargetLimits(Protocol):
    """What conversion asks of a hardware target."""

    @property
    def fc_per_position(self) -> bool: ...
    @property
    def max_channels(self) -> int | None: ...
    @property
    def lanes(self) -> int: ...
    @property
    def operators(self) -> Sequence[str]: ...
    @property
    def keeps_functions(self) -> bool: ...


class Builder:
    """Adds steps to a student.

    Methods take and give `Feature` handles. ``owner`` is the teacher node at work, ``owners``
    tells whose a step is, and ``numbers`` which one it is in the order of steps.
    """

    def __init__(self, target: TargetLimits) -> None:
        self.target = target
        self.graph = StudentGraph(inputs=[], outputs=[])
        self.modules: dict[str, Operator] = {}
        self.owner = ""
        self.owners: dict[str, str] = {}
        self.numbers: dict[str, int] = {}
        self.paths: dict[str, str] = {}
        self._named: dict[str, int] = {}  # by owner and kind, the last number in a name
        self.kept: set[str] = set()  # values that all that follows has to read (taps)

    # -- steps ---------------------------------------------------------------------------------

    def input(self, name: str, shape: tuple[int, ...]) -> Feature:
        self.graph.inputs.append(name)
        self.graph.shapes[name] = shape
        return Feature(shape, first=name)

    def emit(self, kind: str, module: Operator, *inputs: str) -> str:
        """Add one step and give the name of its value."""
        stem = f"{self.owner}_{kind}"
        count = self._named.get(stem, 0)
        name = ""
        while not name or name in self.modules:
            count += 1
            name = stem if count == 1 else f"{stem}{count}"
        self._named[stem] = count
        self.graph.shapes[name] = result_shape(module, [self.graph.shapes[i] for i in inputs])
        self.numbers[name] = len(self.graph.steps)
        self.graph.steps.append(Step(name, tuple(inputs), self.paths.get(self.owner, "")))
        self.modules[name] = module
        self.owners[name] = self.owner
        return name

    def step(self, name: str) -> Step:
        """The step that computes a named value."""
        return self.graph.steps[self.numbers[name]]

    def first(self, feature: Feature) -> str:
        """The value in the order of the feature's shape."""
        self._join(feature)
        if feature.first is None:
            assert feature.last is not None
            rank = len(feature.shape) + 1
            order = _move(rank - 1, feature.axis, rank)
            feature.first = self.emit("first", Permute(order), feature.last)
        return feature.first

    def last(self, feature: Feature) -> str:
        """The value with channels last, where a fully connected layer reads it."""
        rank = len(feature.shape) + 1
        if feature.axis == rank - 1:
            return self.first(feature)
        self._join(feature)
        if feature.last is None:
            assert feature.first is not None
            order = _move(feature.axis, rank - 1, rank)
            feature.last = self.emit("last", Permute(order), feature.first)
        return feature.last

    def from_last(self, shape: tuple[int, ...], axis: int, name: str) -> Feature:
        """A value with channels last as a feature of ``shape``, whose channels are at ``axis``."""
        if axis == len(shape):
            return Feature(shape, first=name, axis=axis)
        return Feature(shape, last=name, axis=axis)

    def tagged(self, value: Value, axis: int) -> Value:
        """The same value, its channels taken to be at ``axis``."""
        if value.axis == axis:
            return value
        feature = self.build(value)
        return Feature(feature.shape, first=self.first(feature), axis=axis)

    def permuted(self, value: Value, order: tuple[int, ...]) -> Value:
        """Axes in another order (the batch is axis 0), moved only if somebody asks.

        Where the axes beside the channels keep their order, both values are one with the channels
        last; linear forms go through such a move.
        """
        if order == tuple(range(len(order))):
            return value
        shape = tuple(value.shape[axis - 1] for axis in order[1:])
        axis = order.index(value.axis)
        others = [other for other in order if other != value.axis]
        kept = others == sorted(others)
        if isinstance(value, Form) and kept and value.is_pointwise and not value.has_spread:
            terms = []
            for term in value.terms:
                moved = self.permuted(term.feature, order)
                assert isinstance(moved, Feature)
                terms.append(replace(term, feature=moved))
            return Form(shape, terms, value.bias, value.owner, axis)
        feature = self.build(value)
        if kept:
            return self.from_last(shape, axis, self.last(feature))
        return self.layout(feature, "permute", Permute(order), axis)

    def _on_either_layout(self, feature: Feature, kind: str, module: Operator) -> Feature:
        """An element-wise operator, on the layout that exists (first, if both do)."""
        self._join(feature)
        shape, axis = feature.shape, feature.axis
        if feature.first is not None:
            return Feature(shape, first=self.emit(kind, module, feature.first), axis=axis)
        assert feature.last is not None
        return Feature(shape, last=self.emit(kind, module, feature.last), axis=axis)

    def activation(self, feature: Feature, low: float, high: float) -> Feature:
        """A ReLU or clip; on parts that nobody has joined yet it acts before the concatenation,
        so that each part is rounded once, right behind the operator that computes it.
        """
        if feature.parts is not None and not (feature.first or feature.last):
            return self.concat([self.activation(part, low, high) for part in feature.parts])
        return self._on_either_layout(feature, "act", Activation(low, high))

    def keeps(self, *operators: str) -> bool:
        """Whether functions, norms or products stay as they are: the target has all of these."""
        return self.target.keeps_functions and set(operators) <= set(self.target.operators)

    def function(self, feature: Feature, kind: str) -> Feature | None:
        """A function of single numbers as the target's own operator; None where it has none."""
        whole = kind in FUNCTIONS and self.keeps(kind)
        parts = kind == "gelu" and self.keeps("erf", "mul", "add", "div")
        if not whole and not parts:
            return None
        return self._on_either_layout(feature, kind, Function(kind, not whole))

    def layout(self, feature: Feature, kind: str, move: Operator, axis: int = 0) -> Feature:
        """A layout move on the value in the order of its shape; ``axis`` is the result's."""
        name = self.emit(kind, move, self.first(feature))
        return Feature(self.graph.shapes[name], first=name, axis=axis)

    def slice(self, feature: Feature, axis: int, start: int, stop: int, step: int = 1) -> Feature:
        """``x[start:stop:step]`` along an axis (batch is axis 0)."""
        if (start, stop, step) == (0, feature.shape[axis - 1], 1):
            return feature
        return self.layout(feature, "slice", Slice(axis, start, stop, step), feature.axis)

    def part(self, feature: Feature, axis: int, start: int, stop: int) -> Feature:
        """``x[start:stop]`` along an axis, as `slice` gives it; of a layer's channels (its queries,
        or keys) it is taken right behind the layer, in front of the moves.
        """
        if (start, stop) == (0, feature.shape[axis - 1]):
            return feature
        name, moves, cut = self.first(feature), list[Operator](), (axis, start, stop)
        while isinstance(move := self.modules.get(name), Permute | Reshape):
            source = self.step(name).inputs[0]
            before = cut_before(move, cut, self.graph.shapes[source])
            if name in self.kept or before is None:
                break
            moves.append(_narrowed(move, cut))
            name, cut = source, before
        channels = len(self.graph.shapes[name]) if isinstance(move, FullyConnected) else 1
        if not isinstance(move, FullyConnected | ops.Convolution) or cut[0] != channels:
            return self.slice(feature, axis, start, stop)
        name = self.emit("part", Slice(*cut), name)
        for moved in reversed(moves):
            name = self.emit("part", moved, name)
        return Feature(self.graph.shapes[name], first=name, axis=feature.axis)

    def reshape(self, feature: Feature, shape: tuple[int, ...]) -> Feature:
        """The same values in another shape; channels that stay an axis of their own stay so."""
        if shape == feature.shape:
            return feature
        ahead = math.prod(feature.shape[: feature.axis - 1])
        same = (
            axis
            for axis, size in enumerate(shape, 1)
            if size == feature.channels and math.prod(shape[: axis - 1]) == ahead
        )
        return self.layout(feature, "reshape", Reshape(shape), next(same, 0))

    def pad(self, feature: Feature, rows: tuple[int, int], columns: tuple[int, int]) -> Feature:
        """Zeros around a map."""
        if not any((*rows, *columns)):
            return feature
        return self.layout(feature, "pad", Pad(((0, 0), rows, columns)))

    def concat(self, features: Sequence[Feature]) -> Feature:
        """Join along the channels, when somebody reads the joined value."""
        if len(features) == 1:
            return features[0]
        axis, shape = features[0].axis, features[0].shape
        shape = resized(shape, axis, sum(f.channels for f in features))
        return Feature(shape, parts=list(features), axis=axis)

    def _join(self, feature: Feature) -> None:
        if feature.parts is None or feature.first or feature.last:
            return
        parts = feature.parts
        for part in parts:
            self._join(part)
        if all(part.first is None for part in parts):
            names = [self.last(part) for part in parts]
            feature.last = self.emit("concat", Concat(len(feature.shape)), *names)
        else:
            names = [self.first(part) for part in parts]
            feature.first = self.emit("concat", Concat(feature.axis), *names)

    def on_first_axis(self, feature: Feature, work: Callable[[Feature], Feature]) -> Feature:
        """A value whose channels are on the first axis while ``work`` is done on it."""
        rank = len(feature.shape) + 1
        there, back = _move(feature.axis, 1, rank), _move(1, feature.axis, rank)
        moved = self.build(self.permuted(feature, there))
        return self.build(self.permuted(work(moved), back))

    def segments(
        self,
        feature: Feature,
        lines: Sequence[tuple[float, float, float]],
        signs: Sequence[float],
        bias: float,
    ) -> Feature:
        """The sum of segments min(max(a x + b, 0), h), the same for all channels, and a bias.

        ``lines`` are (a, b, h), ``signs`` 1 or -1.
        """
        channels, count = feature.channels, len(lines)
        module = Segments(channels, [h if math.isfinite(h) else None for _, _, h in lines])
        merge = ops.Convolution(
            count * channels, channels, 1, 1, 0, groups=channels, copies=count, trainable=False
        )
        with torch.no_grad():
            for index, (slope, start, _) in enumerate(lines):
                module.weight[index].fill_(slope)
                module.bias[index].fill_(start)
            merge.weight.copy_(
                torch.tensor(list(signs))[None, :, None, None].expand(channels, -1, 1, 1)
            )
            merge.bias.fill_(bias)

        def work(x: Feature) -> Feature:
            shape = x.shape
            if len(shape) != 3:
                x = self.layout(x, "map", Reshape((shape[0], math.prod(shape[1:]), 1)), 1)
            name = self.emit("merge", merge, self.emit("segments", module, self.first(x)))
            name = name if len(shape) == 3 else self.emit("shape", Reshape(shape), name)
            return Feature(shape, first=name, axis=1)

        return self.on_first_axis(feature, work)

    def batchnorm(self, feature: Feature, scale: Tensor, bias: Tensor) -> Feature:
        """Scale * x + bias per channel, as a batch norm with neutral statistics.

        The exact inverse of the variance's epsilon is taken into the running variance, so that
        the operator multiplies by ``scale`` itself.
        """
        module = BatchNorm(feature.channels, eps=1e-5)
        with torch.no_grad():
            module.weight.copy_(scale.expand(feature.channels))
            module.bias.copy_(bias.expand(feature.channels))
            module.running_var.fill_(1 - module.eps)
        return self.on_first_axis(feature, lambda x: self.layout(x, "bn", module, 1))

    def element_affine(self, feature: Feature, scale: Tensor, bias: Tensor) -> Feature:
        """Scale * x + bias with a value of their own for every element: (*shape) tensors.

        Flattened, every element is a channel of a batch norm.
        """
        flat = self.layout(feature, "flat", Reshape((math.prod(feature.shape),)))
        normed = self.batchnorm(flat, scale.flatten(), bias.flatten())
        return self.layout(normed, "shape", Reshape(feature.shape), feature.axis)

    def add_constant(self, feature: Feature, constant: Tensor) -> Feature:
        """The sum of a value and a constant of its shape (a table of positions)."""
        for axis in range(constant.dim()):
            if bool((constant == constant.narrow(axis, 0, 1)).all()):
                constant = constant.narrow(axis, 0, 1)
        module = AddConstant(constant.shape)
        with torch.no_grad():
            module.bias.copy_(constant)
        return self.layout(feature, "constant", module, feature.axis)

    def constant(self, tensor: Tensor) -> Feature:
        """A value that is the same for all inputs: zeros, which padding makes, and a shift."""
        name, count = self.graph.inputs[0], tensor.numel()
        one = Feature(self.graph.shapes[name], first=name)
        for axis in range(1, len(one.shape) + 1):
            one = self.slice(one, axis, 0, 1)
        row = self.layout(one, "one", Reshape((1,)))
        zeros = self.slice(self.layout(row, "zeros", Pad(((0, count),))), 1, 1, count + 1)
        return self.add_constant(self.layout(zeros, "shape", Reshape(tuple(tensor.shape))), tensor)

    # -- fully connected layers ----------------------------------------------------------------

    def fully_connected(
        self, name: str, weight: Tensor, bias: Tensor | None = None, *, trainable: bool = True
    ) -> str:
        """A fully connected layer on the last axis of a named value."""
        module = FullyConnected(weight.shape[1], weight.shape[0], trainable)
        with torch.no_grad():
            module.weight.copy_(weight)
            if bias is not None:
                module.bias.copy_(bias.expand(weight.shape[0]))
        return self.emit("fc", module, name)

    def matrix_at_positions(
        self, feature: Feature, weight: Tensor, bias: Tensor, *, trainable: bool = True
    ) -> Feature:
        """Weight @ x + bias at every position: a 1x1 convolution on a map whose channels are first,
        else a fully connected layer on the last axis.
        """
        self._join(feature)
        if feature.is_map and feature.first is not None:
            conv = Convolution(feature, weight[:, :, None, None], self.owner, trainable=trainable)
            return self.convolve(conv, bias)
        shape = resized(feature.shape, feature.axis, weight.shape[0])
        return self._within_channel_limit(
            feature,
            weight,
            bias,
            lambda part, matrix, offset: self.from_last(
                resized(shape, feature.axis, matrix.shape[0]),
                feature.axis,
                self.fully_connected(self.last(part), matrix, offset, trainable=trainable),
            ),
        )

    def spread(self, feature: Feature, shape: tuple[int, ...]) -> Feature:
        """A map of one position at every position of ``shape`` (C, H, W): copies side by side."""
        name = self.first(feature)
        for axis in (3, 2):
            if shape[axis - 1] > 1:
                name = self.emit("spread", Concat(axis), *[name] * shape[axis - 1])
        return Feature(shape, first=name, axis=feature.axis)

    # -- convolutions --------------------------------------------------------------------------

    def _within_channel_limit(
        self,
        feature: Feature,
        weight: Tensor,
        bias: Tensor,
        build: Callable[[Feature, Tensor, Tensor], Feature],
    ) -> Feature:
        """Slice wide maps: outputs are concatenated, partial sums of inputs merged (exact)."""
        limit = self.target.max_channels
        bias = bias.expand(weight.shape[0])
        if limit is None or max(weight.shape[:2]) <= limit:
            return build(feature, weight, bias)
        inputs = [
            (self.slice(feature, feature.axis, i, min(i + limit, weight.shape[1])), i)
            for i in range(0, weight.shape[1], limit)
        ]
        outputs = []
        for o in range(0, weight.shape[0], limit):
            rows = slice(o, o + limit)
            partial = [
                build(
                    part,
                    weight[rows, i : i + part.channels],
                    bias[rows] if i == 0 else torch.zeros_like(bias[rows]),
                )
                for part, i in inputs
            ]
            outputs.append(self.add(partial))
        return self.concat(outputs)

    def convolve(self, conv: Convolution, bias: Tensor) -> Feature:
        """A convolution, in slices where the target limits the channels."""
        owner, self.owner = self.owner, conv.owner
        try:
            bias = bias.expand(conv.weight.shape[0])
            if conv.groups > 1:
                return self._grouped(conv, bias)
            return self._within_channel_limit(
                conv.feature,
                conv.weight,
                bias,
                lambda part, kernel, offset: self._convolution(
                    replace(conv, feature=part, weight=kernel), offset
                ),
            )
        finally:
            self.owner = owner

    def _convolution(self, conv: Convolution, bias: Tensor) -> Feature:
        out, per_group, *kernel = conv.weight.shape
        module = ops.Convolution(
            per_group * conv.groups,
            out,
            kernel,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            trainable=conv.trainable,
        )
        with torch.no_grad():
            module.weight.copy_(conv.weight)
            module.bias.copy_(bias)
        name = self.emit("conv", module, self.first(conv.feature))
        return Feature(self.graph.shapes[name], first=name)

    def _grouped(self, conv: Convolution, bias: Tensor) -> Feature:
        """Groups of channels, as many at a time as the target's limit lets together."""
        out, per_group = conv.weight.shape[0] // conv.groups, conv.weight.shape[1]
        limit = self.target.max_channels
        together = conv.groups if limit is None else max(1, limit // max(per_group, out))
        if together >= conv.groups:
            return self._convolution(conv, bias)
        parts = []
        for first in range(0, conv.groups, together):
            count = min(together, conv.groups - first)
            part = self.slice(conv.feature, 1, first * per_group, (first + count) * per_group)
            rows = slice(first * out, (first + count) * out)
            some = replace(conv, feature=part, weight=conv.weight[rows], groups=count)
            parts.append(self.convolve(some, bias[rows]))
        return self.concat(parts)

    # -- sums ----------------------------------------------------------------------------------

    def add(self, features: Sequence[Feature]) -> Feature:
        """The sum of features (exact)."""
        if len(features) == 1:
            return features[0]
        limit = self.target.max_channels
        if limit is not None and limit < len(features):
            # What joins them, where the target has no addition, would be wider than it takes.
            if limit < 2:
                raise ConversionError("hardware.max_channels=1 leaves no room for an addition")
            return self.add([self.add(features[:2]), *features[2:]])
        for feature in features:
            self._join(feature)
        shape, axis = features[0].shape, features[0].axis
        if all(f.last for f in features) and not all(f.first for f in features):
            return Feature(
                shape, last=self.emit("add", Add(), *map(self.last, features)), axis=axis
            )
        return Feature(shape, first=self.emit("add", Add(), *map(self.first, features)), axis=axis)

    def build(self, value: Value) -> Feature:
        """Turn a linear form into operators; a feature is given back as it is.

        Terms that are matrices at the same positions join into one layer over the concatenated
        features (no extra MACs).
        """
        if isinstance(value, Feature):
            return value
        owner, self.owner = self.owner, value.owner or self.owner
        try:
            return self._build_sum(value)
        finally:
            self.owner = owner

    def _build_sum(self, value: Form) -> Feature:
        bias = value.bias.expand(value.channels)
        terms = [term for term in value.terms if not value.is_spread(term)]
        spread = [term for term in value.terms if value.is_spread(term)]
        pointwise = [t for t in terms if isinstance(t, Convolution) and t.is_pointwise]
        convolutions = [t for t in terms if isinstance(t, Convolution) and not t.is_pointwise]
        carries = [t for t in terms if isinstance(t, Carry)]
        parts: list[Feature] = []
        if spread:
            # At one position the bias costs nothing, wherever the other terms would put it.
            single = self._build_sum(Form((value.channels, 1, 1), spread, bias))
            parts.append(self.spread(single, value.shape))
            bias = torch.zeros_like(bias)
        for conv in convolutions:
            parts.append(self.convolve(conv, bias))
            bias = torch.zeros_like(bias)
        if pointwise:
            owner, self.owner = self.owner, pointwise[-1].owner
            joined = self.concat([t.feature for t in pointwise])
            matrices = [t.weight[:, :, 0, 0] for t in pointwise]
            # Joining even a single one would copy it.
            matrix = matrices[0] if len(matrices) == 1 else torch.cat(matrices, 1)
            parts.append(self.matrix_at_positions(joined, matrix, bias))
            bias = torch.zeros_like(bias)
            self.owner = owner
        for carry in carries:
            scale = torch.ones_like(bias) if carry.scale is None else carry.scale
            if carry.scale is None and not bias.any():
                parts.append(carry.feature)
            else:
                parts.append(self.batchnorm(carry.feature, scale, bias))
                bias = torch.zeros_like(bias)
        return self.add(parts)
