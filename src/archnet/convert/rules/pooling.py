"""Max-, average- and global pooling of any window (exact)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from archnet.convert.feature import Convolution, Feature, Value
from archnet.convert.rules.base import Site, Values, by_map, rule
from archnet.convert.rules.layout import filled, stacked
from archnet.ops import Concat, Permute, Reshape

# Maps split into windows, (C, rows, kernel, columns, kernel): every window's values at the end.
_WINDOWS = Permute((0, 1, 2, 4, 3, 5))


@rule("aten.max_pool2d.default")
@by_map
def max_pool(site: Site) -> Value:
    """A k x k window is k - 1 windows of 2x2 one after the other.

    max over k values = max over 2 of (max over k - 1): k - 2 poolings of stride 1, then one with
    the window's stride. Padding has the lowest value, and each pooling takes one pixel of it (a
    2x2 window on nothing but padding gives the lowest value again).
    """
    (ky, kx), (py, px) = site.pair("kernel_size"), site.pair("padding")
    stride = site.pair("stride") if site.argument("stride") else (ky, kx)
    if site.pair("dilation") != (1, 1) or ky != kx or stride[0] != stride[1] or ky < 2:
        return _any_window(site, (ky, kx), stride, (py, px))
    feature, (_, height, width) = _map(site), site.node.shape
    rows, columns = feature.shape[1:]
    # What the window needs to the right and at the bottom (ceil_mode reaches past the padding).
    bottom = (height - 1) * stride[0] + ky - rows - py
    right = (width - 1) * stride[1] + kx - columns - px
    margin = (px, max(right, 0), py, max(bottom, 0))
    step = stride[0] if stride[0] <= 2 else 1
    for index in range(ky - 1):
        last = index == ky - 2
        left, right, top, bottom = (int(count > index) for count in margin)
        feature = site.builder.maxpool(feature, step if last else 1, (left, right, top, bottom))
    if step != stride[0]:
        feature = site.builder.windows(feature, (1, 1), stride)[0]
    cut = site.builder.slice(feature, 2, 0, height)
    return site.builder.slice(cut, 3, 0, width)


def _any_window(
    site: Site, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> Value:
    """The maximum of every window that is no square, or has gaps, by halves.

    Instead of padding stands what lies at the border, which is in each such window already.
    """
    feature, dilation = _map(site), site.pair("dilation")
    channels, *size = site.node.shape
    for axis, (count, k, s, p, d) in enumerate(
        zip(size, kernel, stride, padding, dilation, strict=True), 2
    ):
        behind = max(0, (count - 1) * s + d * (k - 1) + 1 - feature.shape[axis - 1] - p)
        if p or behind:
            if d > 1:
                raise site.error("max-pooling with gaps and padding has no rule")
            feature = filled(site, feature, axis, "replicate", p, behind)
    views = site.builder.windows(feature, kernel, stride, dilation)
    row = Reshape((math.prod(site.node.shape), 1, len(views)))
    pooled = _row_maximum(site, site.builder.layout(stacked(site, views, 4), "row", row, 1))
    return site.builder.layout(pooled, "map", Reshape((channels, *size)), 1)


@rule("aten.adaptive_max_pool2d.default")
@by_map
def adaptive_max_pool(site: Site) -> Values:
    """Windows of one size, each a row of values whose maximum is taken by halves."""
    feature, builder = _map(site), site.builder
    (channels, rows, columns), size = feature.shape, site.pair("output_size")
    if rows % size[0] or columns % size[1]:
        raise site.error(f"pools {rows}x{columns} into {size[0]}x{size[1]}: it has to divide")
    kernel = (rows // size[0], columns // size[1])
    split = Reshape((channels, size[0], kernel[0], size[1], kernel[1]))
    windows = builder.layout(builder.layout(feature, "split", split), "order", _WINDOWS)
    row = Reshape((channels * size[0] * size[1], 1, kernel[0] * kernel[1]))
    pooled = _row_maximum(site, builder.layout(windows, "window", row, 1))
    return [builder.layout(pooled, "map", Reshape((channels, *size)), 1)]


@rule("aten.amax.default", "aten.max.dim")
def maximum(site: Site) -> Values:
    """The maximum over some axes, moved to the end and taken by halves."""
    builder, dims = site.builder, site.argument("dim")
    axes = sorted(site.axis(d) for d in ([dims] if isinstance(dims, int) else dims))
    feature = site.feature("self")
    shape = tuple(n for axis, n in enumerate(feature.shape, 1) if axis not in axes)
    if site.node.arguments.get("keepdim"):
        shape = tuple(1 if axis in axes else n for axis, n in enumerate(feature.shape, 1))
    rank = len(feature.shape) + 1
    order = (*(a for a in range(rank) if a not in axes), *axes)
    moved = builder.build(builder.permuted(feature, order))
    count = math.prod(feature.shape[axis - 1] for axis in axes)
    row = Reshape((math.prod(feature.shape) // count, 1, count))
    pooled = _row_maximum(site, builder.layout(moved, "row", row, 1))
    result = builder.layout(pooled, "shape", Reshape(shape))
    return [result] if "max.dim" in site.node.operator else result


def _row_maximum(site: Site, row: Feature) -> Feature:
    """The maximum of every row (C, 1, N): 2x2 poolings of stride 2, the row below being padding."""
    while row.shape[2] > 1:
        row = site.builder.maxpool(row, 2, (0, row.shape[2] % 2, 0, 1))
    return row


@rule("aten.avg_pool2d.default")
@by_map
def average_pool(site: Site) -> Value:
    """A fully connected layer with constant weights over the positions of each window.

    Where every window has the same divisor it is k*k -> 1, applied to every channel of every
    window (k*k MACs a value); where borders are divided by fewer pixels it is one constant
    matrix over all positions.
    """
    kernel, padding = site.pair("kernel_size"), site.pair("padding")
    stride = site.pair("stride") if site.argument("stride") else kernel
    feature, override = _map(site), site.argument("divisor_override")
    even = padding == (0, 0) or bool(site.argument("count_include_pad"))
    if even and not site.argument("ceil_mode"):
        divisor = float(override or kernel[0] * kernel[1])
        return _average_windows(site, feature, kernel, stride, padding, divisor)
    ceil, counts = bool(site.argument("ceil_mode")), bool(site.argument("count_include_pad"))
    # A divisor is a number of rows times one of columns; one for all goes to the columns.
    divisors = (1, override) if override else (None, None)

    def along(axis: int, units: Tensor) -> Tensor:
        size, step, pad = (kernel[axis], 1), (stride[axis], 1), (padding[axis], 0)
        return F.avg_pool2d(units, size, step, pad, ceil, counts, divisors[axis])

    return _over_positions(site, feature, along)


@rule("aten.adaptive_avg_pool2d.default")
@by_map
def adaptive_average_pool(site: Site) -> Value:
    """The identity, windows of one size, or a constant matrix over all positions."""
    feature = _map(site)
    size, (rows, columns) = site.node.shape[1:], feature.shape[1:]
    if tuple(size) == (rows, columns):
        return feature
    if 1 not in size and rows % size[0] == 0 and columns % size[1] == 0:
        kernel = (rows // size[0], columns // size[1])
        return _average_windows(site, feature, kernel, kernel, (0, 0), float(kernel[0] * kernel[1]))
    return _over_positions(
        site, feature, lambda axis, units: F.adaptive_avg_pool2d(units, (size[axis], 1))
    )


@rule("aten.mean.dim", "aten.sum.dim_IntList")
def mean(site: Site) -> Value:
    """The mean over some axes: a fully connected layer over them (n -> 1) of weights 1/n; of ones
    for a sum.

    Over rows and columns of a map it is global average pooling; over the tokens of a sequence, or
    over channels, the axis is moved to the end.
    """
    return summed(site, site.feature("self"), "mean" in site.node.operator)


def summed(site: Site, feature: Feature, mean: bool = False) -> Feature:
    """The sum of a feature, or its mean, over the node's axes."""
    builder, axes = site.builder, sorted(map(site.axis, site.argument("dim")))
    count = math.prod(feature.shape[axis - 1] for axis in axes)
    factor = 1 / count if mean else 1.0
    if feature.is_map and axes == [2, 3]:
        weight = torch.full((1, count), factor, dtype=torch.float64)
        pooled = builder.over_positions(feature, weight, (1, 1))
        return builder.reshape(pooled, site.node.shape)
    rank = len(feature.shape) + 1
    order = (*(a for a in range(rank) if a not in axes), *axes)
    moved = builder.build(builder.permuted(feature, order))
    flat = builder.reshape(moved, (*moved.shape[: -len(axes)], count))
    flat = Feature(flat.shape, first=builder.first(flat), axis=len(flat.shape))
    weight = torch.full((1, count), factor, dtype=torch.float64)
    pooled = builder.matrix_at_positions(flat, weight, torch.zeros(1, dtype=torch.float64))
    return builder.reshape(pooled, site.node.shape)


def _map(site: Site) -> Feature:
    """The operator's input as a map (C, H, W)."""
    return site.builder.build(site.tagged("self", 1))


def _over_positions(
    site: Site, feature: Feature, along: Callable[[int, Tensor], Tensor]
) -> Feature:
    """Any pooling that is linear and treats rows and columns alike: a constant matrix.

    ``along`` pools one axis (0: rows, 1: columns) of unit maps (n, 1, n, 1); the matrix over all
    positions is the Kronecker product of what it makes of both.
    """
    matrices = []
    for axis, count in enumerate(feature.shape[1:]):
        units = torch.eye(count, dtype=torch.float64)[:, None, :, None]
        matrices.append(along(axis, units)[:, 0, :, 0].T.contiguous())
    rows, columns = matrices
    return site.builder.over_positions(
        feature, torch.kron(rows, columns), (len(rows), len(columns))
    )


def _average_windows(
    site: Site,
    feature: Feature,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    divisor: float,
) -> Feature:
    builder = site.builder
    taps = kernel[0] * kernel[1]
    channels, rows, columns = site.node.shape
    if not builder.target.fc_per_position:
        # The literal target has no FC over a window: a depthwise convolution says the same.
        weight = torch.full((channels, 1, *kernel), 1.0 / divisor, dtype=torch.float64)
        owner, no_bias = site.node.name, torch.zeros(1, dtype=torch.float64)
        depthwise = Convolution(feature, weight, owner, stride, padding, groups=channels)
        return builder.convolve(depthwise, no_bias)
    if kernel == stride and padding == (0, 0):
        cut = builder.slice(
            builder.slice(feature, 2, 0, rows * kernel[0]), 3, 0, columns * kernel[1]
        )
        split = builder.layout(
            cut, "split", Reshape((channels, rows, kernel[0], columns, kernel[1]))
        )
        order = builder.layout(split, "order", _WINDOWS)
        window = builder.layout(order, "window", Reshape((channels, rows, columns, taps)))
        name = builder.first(window)
    else:
        padded = builder.pad(feature, (padding[0],) * 2, (padding[1],) * 2)
        names = [
            builder.emit("tap", Reshape((channels, rows, columns, 1)), builder.first(view))
            for view in builder.windows(padded, kernel, stride)
        ]
        name = builder.emit("concat", Concat(4), *names)
    weight = torch.full((1, taps), 1.0 / divisor, dtype=torch.float64)
    pooled = builder.fully_connected(name, weight, trainable=False)
    flat = Feature((channels, rows, columns, 1), first=pooled)
    return builder.layout(flat, "map", Reshape((channels, rows, columns)))
