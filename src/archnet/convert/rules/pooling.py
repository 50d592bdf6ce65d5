"""Max-, average- and global pooling of any window (exact)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from archnet.convert.feature import Feature, Value
from archnet.convert.rules.base import Site, Values, by_map, rule
from archnet.ops import AveragePool, MaxPool, Mean, Reshape


@rule("aten.max_pool2d.default")
@by_map
def max_pool(site: Site) -> Value:
    """The maximum over every window; padding has the lowest value.

    What the window needs to the right and at the bottom (ceil_mode reaches past the padding) is
    padding as well; what it does not reach is left out.
    """
    kernel, before = site.pair("kernel_size"), site.pair("padding")
    stride = site.pair("stride") if site.argument("stride") else kernel
    dilation, feature = site.pair("dilation"), _map(site)
    after = [
        (count - 1) * s + d * (k - 1) + 1 - size - p
        for count, s, d, k, size, p in zip(
            site.node.shape[1:], stride, dilation, kernel, feature.shape[1:], before, strict=True
        )
    ]
    margin = (before[1], max(after[1], 0), before[0], max(after[0], 0))
    return site.builder.layout(feature, "pool", MaxPool(stride, margin, kernel, dilation), 1)


@rule("aten.adaptive_max_pool2d.default")
@by_map
def adaptive_max_pool(site: Site) -> Values:
    """Windows of one size."""
    feature, size = _map(site), site.pair("output_size")
    _, rows, columns = feature.shape
    if rows % size[0] or columns % size[1]:
        raise site.error(
            f"pools {rows}x{columns} to {size[0]}x{size[1]}; only sizes that divide have a rule"
        )
    kernel = (rows // size[0], columns // size[1])
    return [site.builder.layout(feature, "pool", MaxPool(kernel, kernel=kernel), 1)]


@rule("aten.amax.default", "aten.max.dim")
def maximum(site: Site) -> Values:
    """The maximum over some axes, moved to the end: one window over all of a row."""
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
    window = MaxPool(1, kernel=(1, count))
    pooled = builder.layout(builder.layout(moved, "row", row, 1), "pool", window, 1)
    result = builder.layout(pooled, "shape", Reshape(shape))
    return [result] if "max.dim" in site.node.operator else result


@rule("aten.avg_pool2d.default")
@by_map
def average_pool(site: Site) -> Value:
    """The mean over every window.

    Where borders are divided by fewer pixels it is one constant matrix over the rows, and one over
    the columns.
    """
    kernel, padding = site.pair("kernel_size"), site.pair("padding")
    stride = site.pair("stride") if site.argument("stride") else kernel
    feature, override = _map(site), site.argument("divisor_override")
    even = padding == (0, 0) or bool(site.argument("count_include_pad"))
    if even and not site.argument("ceil_mode"):
        factor = 1 / float(override or kernel[0] * kernel[1])
        pool = AveragePool(kernel, stride, padding, factor)
        return site.builder.layout(feature, "pool", pool, 1)
    ceil, counts = bool(site.argument("ceil_mode")), bool(site.argument("count_include_pad"))
    # A divisor is a number of rows times one of columns; one for all goes to the columns.
    divisors = (1, override) if override else (None, None)

    def along(axis: int, units: Tensor) -> Tensor:
        size, step, pad = (kernel[axis], 1), (stride[axis], 1), (padding[axis], 0)
        return F.avg_pool2d(units, size, step, pad, ceil, counts, divisors[axis])

    return _along_both(site, feature, along)


@rule("aten.adaptive_avg_pool2d.default")
@by_map
def adaptive_average_pool(site: Site) -> Value:
    """The identity, windows of one size, or a constant matrix over rows and one over columns."""
    feature, builder = _map(site), site.builder
    size, (rows, columns) = site.node.shape[1:], feature.shape[1:]
    if tuple(size) == (rows, columns):
        return feature
    if tuple(size) == (1, 1):
        mean = builder.layout(feature, "mean", Mean((2, 3), 1 / (rows * columns)))
        return builder.layout(mean, "map", Reshape(site.node.shape), 1)
    if rows % size[0] == 0 and columns % size[1] == 0:
        kernel = (rows // size[0], columns // size[1])
        pool = AveragePool(kernel, kernel, 0, 1 / (kernel[0] * kernel[1]))
        return builder.layout(feature, "pool", pool, 1)
    return _along_both(
        site, feature, lambda axis, units: F.adaptive_avg_pool2d(units, (size[axis], 1))
    )


@rule("aten.mean.dim", "aten.sum.dim_IntList")
def mean(site: Site) -> Value:
    """The mean over some axes, or the sum."""
    return summed(site, site.feature("self"), "mean" in site.node.operator)


def summed(site: Site, feature: Feature, mean: bool = False) -> Feature:
    """The sum of a feature, or its mean, over the node's axes."""
    builder, axes = site.builder, sorted(map(site.axis, site.argument("dim")))
    count = math.prod(feature.shape[axis - 1] for axis in axes)
    factor = 1 / count if mean else 1.0
    # Channels stay an axis of their own where they are not summed.
    gone = feature.axis in axes
    axis = 0 if gone else feature.axis - sum(other < feature.axis for other in axes)
    name = builder.emit("mean", Mean(axes, factor), builder.first(feature))
    total = Feature(builder.graph.shapes[name], first=name, axis=axis)
    return builder.reshape(total, site.node.shape)


def _map(site: Site) -> Feature:
    """The operator's input as a map (C, H, W)."""
    return site.builder.build(site.tagged("self", 1))


def _along_both(site: Site, feature: Feature, along: Callable[[int, Tensor], Tensor]) -> Feature:
    """Any pooling that is linear and treats rows and columns alike.

    ``along`` pools one axis (0: rows, 1: columns) of unit maps (n, 1, n, 1).
    """
    builder = site.builder
    for axis, count in enumerate(feature.shape[1:]):
        units = torch.eye(count, dtype=torch.float64)[:, None, :, None]
        matrix = along(axis, units)[:, 0, :, 0].T.contiguous()
        lines = Feature(feature.shape, first=builder.first(feature), axis=axis + 2)
        zeros = torch.zeros(len(matrix), dtype=torch.float64)
        feature = builder.matrix_at_positions(lines, matrix, zeros, trainable=False)
    return Feature(feature.shape, first=builder.first(feature), axis=1)
