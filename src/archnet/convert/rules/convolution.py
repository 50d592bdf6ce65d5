"""Convolutions of any kernel, stride, dilation and grouping (exact)."""

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from archnet.convert.builder import Builder
from archnet.convert.feature import Convolution, Feature, Form, Value
from archnet.convert.rules.base import Site, matrix_on, rule
from archnet.ops import Pad, Permute, Reshape


@rule("aten.conv2d.default", "aten.conv2d.padding")
def convolution(site: Site) -> Value:
    """y = W * x + b, read as a linear form.

    A per-channel scale and shift in front of an unpadded 1x1 convolution goes into its weights.
    In front of any other convolution it stays, because zero padding comes after it.
    """
    weight = _kernel(site)
    stride, dilation = site.pair("stride"), site.pair("dilation")
    padding = _padding(site, weight.shape[2], weight.shape[3], dilation)
    groups = site.argument("groups")
    bias = _bias(site, len(weight))
    value = site.tagged("input", site.axis(1))
    if weight.shape[2:] == (1, 1) and padding == (0, 0) and groups == 1 and stride == (1, 1):
        return matrix_on(site, value, weight[:, :, 0, 0], bias)
    feature = site.builder.build(value)
    if len(value.shape) == 4:
        kernel = Convolution(feature, weight, site.node.name, stride, padding, dilation, groups)
        return _of_images(site.builder, kernel, bias, site.node.shape)
    term = Convolution(feature, weight, site.node.name, stride, padding, dilation, groups)
    return Form(site.node.shape, [term], bias)


def _of_images(builder: Builder, conv: Convolution, bias: Tensor, shape: tuple[int, ...]) -> Value:
    """Several images a sample, (N, C, H, W), one below the other as one map, with their padding.

    The rows at which the window lies on two of them are computed and thrown away.
    """
    images, channels, height, width = conv.feature.shape
    (stride, _), (side, across) = conv.stride, conv.padding
    span = conv.dilation[0] * (conv.weight.shape[2] - 1) + 1
    # Every image begins at a row where the window stops.
    tall = -(-max(height + 2 * side, span) // stride) * stride
    first = builder.build(builder.permuted(conv.feature, (0, 2, 1, 3, 4)))
    room = Pad(((0, 0), (0, 0), (side, tall - height - side), (across, across)))
    apart = builder.layout(first, "apart", room, 1)
    below = Reshape((channels, images * tall, width + 2 * across))
    one = builder.layout(apart, "below", below, 1)
    one = builder.pad(one, (0, max(0, span - stride)), (0, 0))
    made = builder.convolve(replace(conv, feature=one, padding=(0, 0)), bias)
    split = Reshape((shape[1], images, tall // stride, shape[3]))
    parts = builder.layout(made, "images", split, 1)
    rows = builder.slice(parts, 3, 0, shape[2])
    return builder.permuted(rows, (0, 2, 1, 3, 4))


@rule("aten.conv_transpose2d.input")
def transposed_convolution(site: Site) -> Value:
    """A convolution with the kernel turned round, over pixels that zeros keep apart.

    Where windows do not overlap (kernel = stride) it is a matrix at every position, whose results
    are the pixels of a window.
    """
    builder, weight = site.builder, _kernel(site)
    feature = builder.build(site.tagged("input", 1))
    stride, padding, dilation = (site.pair(n) for n in ("stride", "padding", "dilation"))
    groups, extra = site.argument("groups"), site.pair("output_padding")
    kernel, outputs = tuple(weight.shape[2:]), weight.shape[1] * groups
    bias = _bias(site, outputs)
    if kernel == stride and (padding, dilation, extra, groups) == ((0, 0), (1, 1), (0, 0), 1):
        matrix = weight.flatten(1).T
        offset = bias.repeat_interleave(kernel[0] * kernel[1])
        built = builder.first(builder.matrix_at_positions(feature, matrix, offset))
        split = Reshape((outputs, *kernel, *feature.shape[1:]))
        parts = builder.layout(Feature(builder.graph.shapes[built], first=built), "split", split)
        moved = builder.layout(parts, "order", Permute((0, 1, 4, 2, 5, 3)))
        return builder.layout(moved, "shape", Reshape(site.node.shape), 1)
    sides = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    if min(sides) < 0:
        raise site.error("is padded by more than its kernel: pad less, or slice its result")
    feature = _apart(builder, feature, stride)
    feature = builder.pad(feature, (0, extra[0]), (0, extra[1]))
    turned = weight.flip(2, 3).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    term = Convolution(
        feature, turned, site.node.name, (1, 1), (sides[0], sides[1]), dilation, groups
    )
    return Form(site.node.shape, [term], bias)


@rule("aten.col2im.default")
def overlapping_windows(site: Site) -> Value:
    """Windows (C kh kw, H' W') laid over each other and added: one map for each of their pixels."""
    site.require_batch_ahead(2)
    builder, feature = site.builder, site.feature("self")
    kernel, stride, padding, dilation = (
        site.pair(name) for name in ("kernel_size", "stride", "padding", "dilation")
    )
    height, width = site.pair("output_size")
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip((height, width), padding, dilation, kernel, stride, strict=True)
    ]
    channels, maps = site.node.shape[0], []
    apart = builder.reshape(feature, (channels, kernel[0] * kernel[1], *size))
    for tap, at in enumerate(itertools.product(*map(range, kernel))):
        view = builder.reshape(builder.slice(apart, 2, tap, tap + 1), (channels, *size))
        view = _apart(builder, view, stride)
        starts = [place * step for place, step in zip(at, dilation, strict=True)]
        rows, columns = (
            (start, n + 2 * p - start - length)
            for start, n, p, length in zip(
                starts, (height, width), padding, view.shape[1:], strict=True
            )
        )
        maps.append(builder.pad(view, rows, columns))
    total = builder.add(maps)
    for axis, (side, n) in enumerate(zip(padding, (height, width), strict=True), 2):
        total = builder.slice(total, axis, side, side + n)
    return total


def _apart(builder: Builder, feature: Feature, stride: tuple[int, int]) -> Feature:
    """A map whose pixels zeros keep apart, so that they lie a stride from each other."""
    if stride == (1, 1):
        return feature
    channels, rows, columns = feature.shape
    apart = builder.layout(feature, "apart", Reshape((channels, rows, 1, columns, 1)))
    zeros = Pad(((0, 0), (0, 0), (0, stride[0] - 1), (0, 0), (0, stride[1] - 1)))
    sparse = Reshape((channels, rows * stride[0], columns * stride[1]))
    feature = builder.layout(builder.layout(apart, "zeros", zeros), "sparse", sparse, 1)
    feature = builder.slice(feature, 2, 0, (rows - 1) * stride[0] + 1)
    return builder.slice(feature, 3, 0, (columns - 1) * stride[1] + 1)


def _kernel(site: Site) -> Tensor:
    weight = site.fixed("weight")
    assert weight is not None
    site.require_batch_ahead(3)
    return weight


def _bias(site: Site, outputs: int) -> Tensor:
    bias = site.fixed("bias")
    return torch.zeros(outputs, dtype=torch.float64) if bias is None else bias


def _padding(site: Site, kh: int, kw: int, dilation: tuple[int, int]) -> tuple[int, int]:
    padding = site.argument("padding")
    if padding == "valid":
        return (0, 0)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, (kh, kw), strict=True)]
        if any(n % 2 for n in total):
            raise site.error("padding='same' of an even kernel pads unevenly; use nn.ZeroPad2d")
        return (total[0] // 2, total[1] // 2)
    return site.pair("padding")
