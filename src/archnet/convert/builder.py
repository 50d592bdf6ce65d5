"""Builds a student operator by operator, in the cheapest exact form that the target allows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from archnet.convert.feature import Carry, Convolution, Feature, Form, Value, resized
from archnet.errors import ArchnetError
from archnet.ops import (
    Activation,
    BatchNorm,
    Concat,
    Conv3x3,
    FullyConnected,
    MaxPool2x2,
    Operator,
    Pad,
    Permute,
    Reshape,
    Slice,
    Step,
    StudentGraph,
)


def _move(axis: int, to: int, rank: int) -> tuple[int, ...]:
    """The order of axes that moves one of them; ``rank`` counts the batch."""
    order = [other for other in range(rank) if other != axis]
    order.insert(to, axis)
    return tuple(order)


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
    def merge_lanes(self) -> int: ...


class Builder:
    """Adds steps to a student.

    Methods take and give `Feature` handles. ``owner`` is the teacher node at work: the
    multiply-accumulates of every step are charged to it, and ``owners`` tells whose a step is.
    """

    def __init__(self, target: TargetLimits) -> None:
        self.target = target
        self.graph = StudentGraph(inputs=[], output="")
        self.modules: dict[str, Operator] = {}
        self.owner = ""
        self.macs: dict[str, int] = {}
        self.owners: dict[str, str] = {}
        self.paths: dict[str, str] = {}

    # -- steps ---------------------------------------------------------------------------------

    def input(self, name: str, shape: tuple[int, ...]) -> Feature:
        self.graph.inputs.append(name)
        self.graph.shapes[name] = shape
        return Feature(shape, first=name)

    def emit(self, kind: str, module: Operator, *inputs: str) -> str:
        """Add one step and give the name of its value."""
        name = f"{self.owner}_{kind}"
        count = 1
        while name in self.modules:
            count += 1
            name = f"{self.owner}_{kind}{count}"
        ghosts = [torch.empty(1, *self.graph.shapes[i], device="meta") for i in inputs]
        # Weights do not matter for the shape, so a float operator can run on ghosts.
        with torch.no_grad():
            shape = tuple(_shape_of(module, ghosts)[1:])
        self.graph.shapes[name] = shape
        self.graph.steps.append(Step(name, tuple(inputs), self.paths.get(self.owner, "")))
        self.modules[name] = module
        self.owners[name] = self.owner
        macs = 0
        if isinstance(module, Conv3x3):
            macs = math.prod(shape) * module.in_channels * 9
        elif isinstance(module, FullyConnected):
            macs = math.prod(shape) * module.in_features
        self.macs[self.owner] = self.macs.get(self.owner, 0) + macs
        return name

    def step(self, name: str) -> Step:
        """The step that computes a named value."""
        for step in reversed(self.graph.steps):
            if step.name == name:
                return step
        raise KeyError(name)

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

    def layout(self, feature: Feature, kind: str, move: Operator, axis: int = 0) -> Feature:
        """A layout move on the value in the order of its shape; ``axis`` is the result's."""
        name = self.emit(kind, move, self.first(feature))
        return Feature(self.graph.shapes[name], first=name, axis=axis)

    def slice(self, feature: Feature, axis: int, start: int, stop: int, step: int = 1) -> Feature:
        """``x[start:stop:step]`` along an axis (batch is axis 0)."""
        if (start, stop, step) == (0, feature.shape[axis - 1], 1):
            return feature
        return self.layout(feature, "slice", Slice(axis, start, stop, step), feature.axis)

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

    def maxpool(self, feature: Feature, stride: int, padding: tuple[int, int, int, int]) -> Feature:
        return self.layout(feature, "pool", MaxPool2x2(stride, padding))

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
        rank = len(feature.shape) + 1
        there, back = _move(feature.axis, 1, rank), _move(1, feature.axis, rank)
        moved = self.build(self.permuted(feature, there))
        return self.build(self.permuted(self.layout(moved, "bn", module, 1), back))

    def element_affine(self, feature: Feature, scale: Tensor, bias: Tensor) -> Feature:
        """Scale * x + bias with a value of their own for every element: (*shape) tensors.

        Flattened, every element is a channel of a batch norm: so a table of positions is added.
        """
        flat = self.layout(feature, "flat", Reshape((math.prod(feature.shape),)))
        normed = self.batchnorm(flat, scale.flatten(), bias.flatten())
        return self.layout(normed, "shape", Reshape(feature.shape), feature.axis)

    def constant(self, tensor: Tensor) -> Feature:
        """A value that is the same for all inputs: zeros, which padding makes, and a shift."""
        name, count = self.graph.inputs[0], tensor.numel()
        one = Feature(self.graph.shapes[name], first=name)
        for axis in range(1, len(one.shape) + 1):
            one = self.slice(one, axis, 0, 1)
        row = self.layout(one, "one", Reshape((1,)))
        zeros = self.slice(self.layout(row, "zeros", Pad(((0, count),))), 1, 1, count + 1)
        ones = torch.ones(1, dtype=torch.float64)
        shifted = self.batchnorm(zeros, ones, tensor.flatten())
        return self.layout(shifted, "shape", Reshape(tuple(tensor.shape)))

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

    def matrix_at_positions(self, feature: Feature, weight: Tensor, bias: Tensor) -> Feature:
        """Weight @ x + bias at every position: an FC where the target has it, else a 3x3.

        The 3x3 carries the matrix in its centre (eight zero taps, nine times the MACs).
        """
        shape = resized(feature.shape, feature.axis, weight.shape[0])
        if len(shape) > 1 and not self.target.fc_per_position:
            if not feature.is_map:
                return self._as_map(feature, lambda x: self.matrix_at_positions(x, weight, bias))
            kernel = torch.zeros(*weight.shape, 3, 3, dtype=weight.dtype)
            kernel[:, :, 1, 1] = weight
            return self.conv3x3(feature, kernel, bias, stride=1, padding=1)
        if len(shape) == 1:
            return Feature(shape, first=self.fully_connected(self.first(feature), weight, bias))
        return self._within_channel_limit(
            feature,
            weight,
            bias,
            lambda part, matrix, offset: self.from_last(
                resized(shape, feature.axis, matrix.shape[0]),
                feature.axis,
                self.fully_connected(self.last(part), matrix, offset),
            ),
        )

    def _as_map(self, feature: Feature, work: Callable[[Feature], Feature]) -> Feature:
        """``work`` on a map (C, positions, 1) of a feature that has other axes."""
        rank = len(feature.shape) + 1
        front = self.build(self.permuted(feature, _move(feature.axis, 1, rank)))
        positions = front.shape[1:]
        flat = self.layout(front, "map", Reshape((front.channels, math.prod(positions), 1)), 1)
        done = work(flat)
        tall = self.layout(done, "unmap", Reshape((done.channels, *positions)), 1)
        return self.build(self.permuted(tall, _move(1, feature.axis, rank)))

    def spread(self, feature: Feature, shape: tuple[int, ...]) -> Feature:
        """A map of one position at every position of ``shape`` (C, H, W): a column of ones."""
        ones = torch.ones(math.prod(shape[1:]), 1, dtype=torch.float64)
        return self.over_positions(feature, ones, (shape[1], shape[2]))

    def over_positions(self, feature: Feature, matrix: Tensor, shape: tuple[int, int]) -> Feature:
        """A constant linear map over the positions of a map, the same for every channel.

        ``matrix`` is (H'W', HW): a fully connected layer on (C, HW), as average pooling needs; or
        on lanes of flattened channels, where the target has no FC at positions.
        """
        channels, height, width = feature.shape
        if not self.target.fc_per_position:
            # Only flattened features meet a fully connected layer there: a lane of channels is
            # flattened, and the matrix stands once for each of them on the diagonal.
            parts = []
            for start in range(0, channels, self.target.lanes):
                part = self.slice(feature, 1, start, min(start + self.target.lanes, channels))
                flat = self.layout(part, "flat", Reshape((part.channels * height * width,)))
                diagonal = torch.kron(torch.eye(part.channels).to(matrix), matrix.contiguous())
                name = self.fully_connected(self.first(flat), diagonal, trainable=False)
                pooled = Feature(self.graph.shapes[name], first=name)
                parts.append(self.layout(pooled, "map", Reshape((part.channels, *shape))))
            return self.concat(parts)
        flat = self.layout(feature, "flat", Reshape((channels, height * width)))
        name = self.fully_connected(self.first(flat), matrix, trainable=False)
        return self.layout(
            Feature(self.graph.shapes[name], first=name), "map", Reshape((channels, *shape))
        )

    def windows(
        self,
        feature: Feature,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        dilation: tuple[int, int] = (1, 1),
    ) -> list[Feature]:
        """The kh * kw shifted views of a map under an unpadded window, in row-major order."""
        _, height, width = feature.shape
        size = [
            (n - d * (k - 1) - 1) // s + 1
            for n, k, s, d in zip((height, width), kernel, stride, dilation, strict=True)
        ]
        views = []
        for i in range(kernel[0]):
            start = i * dilation[0]
            stop = start + (size[0] - 1) * stride[0] + 1
            rows = self.slice(feature, 2, start, stop, stride[0])
            for j in range(kernel[1]):
                start = j * dilation[1]
                stop = start + (size[1] - 1) * stride[1] + 1
                views.append(self.slice(rows, 3, start, stop, stride[1]))
        return views

    # -- convolutions --------------------------------------------------------------------------

    def conv3x3(
        self, feature: Feature, weight: Tensor, bias: Tensor, stride: int, padding: int
    ) -> Feature:
        """A dense 3x3 convolution, in slices where the target limits the channels."""

        def build(part: Feature, kernel: Tensor, offset: Tensor) -> Feature:
            module = Conv3x3(kernel.shape[1], kernel.shape[0], stride, padding)
            with torch.no_grad():
                module.weight.copy_(kernel)
                module.bias.copy_(offset.expand(kernel.shape[0]))
            name = self.emit("conv", module, self.first(part))
            return Feature(self.graph.shapes[name], first=name)

        return self._within_channel_limit(feature, weight, bias, build)

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
        """Any convolution, exactly.

        - 1x1: a matrix at every position (of every stride-th pixel).
        - 3x3, stride 1 or 2: the operator itself.
        - grouped: lanes of whole groups, each dense with zeros between its groups; depthwise
          layers take ``target.lanes`` channels a lane, so that they cost lanes times their MACs
          and not C times.
        - any other kernel, stride or dilation: the window's views side by side, then a matrix at
          every position (1x the MACs); or, where the target has no FC at positions, 3x3
          convolutions over views shifted by three.
        """
        owner, self.owner = self.owner, conv.owner
        try:
            bias = bias.expand(conv.weight.shape[0])
            if conv.groups > 1:
                return self._grouped(conv, bias)
            return self._dense(conv, bias)
        finally:
            self.owner = owner

    def _dense(self, conv: Convolution, bias: Tensor) -> Feature:
        kernel = (conv.weight.shape[2], conv.weight.shape[3])
        feature, stride, (py, px) = conv.feature, conv.stride, conv.padding
        square = stride[0] == stride[1] and stride[0] <= 2
        if kernel == (3, 3) and conv.dilation == (1, 1) and square:
            if py == px and py <= 1:
                return self.conv3x3(feature, conv.weight, bias, stride[0], py)
            padded = self.pad(feature, (py, py), (px, px))
            return self.conv3x3(padded, conv.weight, bias, stride[0], 0)
        padded = self.pad(feature, (py, py), (px, px))
        if kernel == (1, 1):
            return self.matrix_at_positions(
                self.windows(padded, kernel, stride)[0], conv.weight[:, :, 0, 0], bias
            )
        if self.target.fc_per_position:
            return self._patches(padded, conv, bias)
        return self._shifted(padded, conv, bias)

    def _patches(self, padded: Feature, conv: Convolution, bias: Tensor) -> Feature:
        """im2col by layout moves, then one fully connected layer at every position."""
        out, channels, kh, kw = conv.weight.shape
        if conv.stride == (kh, kw) and conv.dilation == (1, 1):
            # Patches that do not overlap are a reshape.
            rows, columns = padded.shape[1] // kh, padded.shape[2] // kw
            cut = self.slice(self.slice(padded, 2, 0, rows * kh), 3, 0, columns * kw)
            split = self.layout(cut, "split", Reshape((channels, rows, kh, columns, kw)))
            order = self.layout(split, "order", Permute((0, 2, 4, 1, 3, 5)))
            flat = self.layout(order, "patch", Reshape((rows, columns, channels * kh * kw)))
            patches = Feature((channels * kh * kw, rows, columns), last=flat.first)
            matrix = conv.weight.reshape(out, -1)
        else:
            patches = self.concat(self.windows(padded, (kh, kw), conv.stride, conv.dilation))
            matrix = conv.weight.permute(0, 2, 3, 1).reshape(out, -1)
        return self.matrix_at_positions(patches, matrix, bias)

    def _shifted(self, padded: Feature, conv: Convolution, bias: Tensor) -> Feature:
        """Taps in groups of 3x3 neighbours: one view per group, one 3x3 over all views."""
        out, channels, kh, kw = conv.weight.shape
        dy, dx = conv.dilation
        spread = conv.weight.new_zeros(out, channels, dy * (kh - 1) + 1, dx * (kw - 1) + 1)
        spread[:, :, ::dy, ::dx] = conv.weight
        _, _, height, width = spread.shape
        if any(s != conv.stride[0] or s > 2 for s in conv.stride):
            # A wider stride: convolve at every pixel, keep every s-th.
            dense = Convolution(padded, spread, conv.owner)
            full = self._shifted(padded, dense, bias)
            return self.windows(full, (1, 1), conv.stride)[0]
        stride = conv.stride[0]
        rows = (padded.shape[1] - height) // stride * stride + 3
        columns = (padded.shape[2] - width) // stride * stride + 3
        reach_y, reach_x = -(-height // 3) * 3, -(-width // 3) * 3
        wide = self.pad(padded, (0, reach_y - height), (0, reach_x - width))
        views, kernels = [], []
        for y in range(0, reach_y, 3):
            for x in range(0, reach_x, 3):
                tile = spread[:, :, y : y + 3, x : x + 3]
                if not tile.any():
                    continue
                view = self.slice(wide, 2, y, y + rows)
                views.append(self.slice(view, 3, x, x + columns))
                kernel = spread.new_zeros(out, channels, 3, 3)
                kernel[:, :, : tile.shape[2], : tile.shape[3]] = tile
                kernels.append(kernel)
        if not kernels:
            kernels = [spread.new_zeros(out, channels, 3, 3)]
            views = [self.slice(self.slice(wide, 2, 0, rows), 3, 0, columns)]
        return self.conv3x3(self.concat(views), torch.cat(kernels, 1), bias, stride, 0)

    def _grouped(self, conv: Convolution, bias: Tensor) -> Feature:
        out, per_group = conv.weight.shape[:2]
        out_per_group = out // conv.groups
        together = max(1, self.target.lanes // max(per_group, out_per_group))
        kernel = (conv.weight.shape[2], conv.weight.shape[3])
        lanes = [range(g, min(g + together, conv.groups)) for g in range(0, conv.groups, together)]
        stacked = None
        if kernel not in ((1, 1), (3, 3)) and self.target.fc_per_position:
            stacked = self._stacked_windows(conv)
        parts = []
        for lane in lanes:
            first, count = lane[0], len(lane)
            weight = conv.weight.new_zeros(count * out_per_group, count * per_group, *kernel)
            for n, group in enumerate(lane):
                rows = slice(n * out_per_group, (n + 1) * out_per_group)
                columns = slice(n * per_group, (n + 1) * per_group)
                weight[rows, columns] = conv.weight[
                    group * out_per_group : (group + 1) * out_per_group
                ]
            offset = bias[first * out_per_group : (first + count) * out_per_group]
            start, stop = first * per_group, (first + count) * per_group
            if stacked is None:
                part = self.slice(conv.feature, 1, start, stop)
                dense = Convolution(
                    part, weight, conv.owner, conv.stride, conv.padding, conv.dilation
                )
                parts.append(self._dense(dense, offset))
            else:
                view = self.slice(stacked, 4, start, stop)
                rows_, columns_ = view.shape[:2]
                taps = kernel[0] * kernel[1] * (stop - start)
                flat = self.layout(view, "patch", Reshape((rows_, columns_, taps)))
                patches = Feature((taps, rows_, columns_), last=flat.first)
                matrix = weight.permute(0, 2, 3, 1).reshape(len(offset), -1)
                parts.append(self.matrix_at_positions(patches, matrix, offset))
        return self.concat(parts)

    def _stacked_windows(self, conv: Convolution) -> Feature:
        """All views of a window once for all lanes: (H', W', kh * kw, C)."""
        (py, px), kernel = conv.padding, (conv.weight.shape[2], conv.weight.shape[3])
        padded = self.pad(conv.feature, (py, py), (px, px))
        names = []
        for view in self.windows(padded, kernel, conv.stride, conv.dilation):
            channels, rows, columns = view.shape
            name = self.emit("tap", Reshape((rows, columns, 1, channels)), self.last(view))
            names.append(name)
        name = self.emit("concat", Concat(3), *names)
        return Feature(self.graph.shapes[name], first=name)

    # -- sums ----------------------------------------------------------------------------------

    def add(
        self, features: Sequence[Feature], scales: Sequence[float] = (), bias: float = 0.0
    ) -> Feature:
        """Addition as concatenation and a fully connected layer [I, I, ...] (exact).

        The identity is the same in every lane of ``target.merge_lanes`` channels, so one small
        layer serves all lanes of all positions: 2 * lanes MACs a value where a layer over all
        channels would need 2 * C. With ``scales``, one number for every feature, and a ``bias``
        it is any weighted sum. It is a constant of the conversion, and not trained.
        """
        if len(features) == 1 and not scales:
            return features[0]
        factors = list(scales) or [1.0] * len(features)
        channels = features[0].channels
        # Weighted sums stand behind every smooth activation, where narrow lanes count.
        widest = self.target.lanes if scales else self.target.merge_lanes
        axis = features[0].axis
        literal = len(features[0].shape) > 1 and not self.target.fc_per_position
        if literal and self.target.max_channels is not None:
            # A merge is a convolution here, and has to fit the limit as well, with two sums a time.
            if len(features) > 2:
                first = self.add(features[:2], factors[:2])
                return self.add([first, *features[2:]], [1.0, *factors[2:]], bias)
            widest = min(widest, self.target.max_channels // 2)
            if not widest:
                raise ConversionError("hardware.max_channels=1 leaves no room for an addition")
        lane = max(d for d in range(1, widest + 1) if channels % d == 0)
        eye = torch.cat([f * torch.eye(lane, dtype=torch.float64) for f in factors], 1)
        offset = torch.full((lane,), bias, dtype=torch.float64)
        if literal:
            parts = []
            for start in range(0, channels, lane):
                slices = [self.slice(f, axis, start, start + lane) for f in features]
                parts.append(self.matrix_at_positions(self.concat(slices), eye, offset))
            return self.concat(parts)
        names = [self.last(f) for f in features]
        positions = self.graph.shapes[names[0]][:-1]
        if lane != channels:
            lanes = (*positions, channels // lane, lane)
            names = [self.emit("lanes", Reshape(lanes), name) for name in names]
        joined = self.emit("concat", Concat(len(self.graph.shapes[names[0]])), *names)
        total = self.fully_connected(joined, eye, offset, trainable=False)
        if lane != channels:
            total = self.emit("join", Reshape((*positions, channels)), total)
        return self.from_last(features[0].shape, axis, total)

    def build(self, value: Value) -> Feature:
        """Turn a linear form into operators; a feature is given back as it is.

        Terms that are matrices at the same positions join into one layer over the concatenated
        features (no extra MACs). An identity never joins a trained matrix in one layer: weights
        of such different size would share one low-bit scale.
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


def _shape_of(module: Operator, ghosts: list[Tensor]) -> torch.Size:
    """The shape of an operator's result, computed on the meta device."""
    if isinstance(module, Activation):
        return ghosts[0].shape  # clamp takes 20 ms there, and a student has hundreds
    state = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }
    result = torch.func.functional_call(module, state, tuple(ghosts))
    return result.shape
