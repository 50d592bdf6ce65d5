"""Layout moves of the teacher (exact): they compute nothing. And changes of size."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from archnet.capture import Ref
from archnet.convert.feature import Feature, Value, resized
from archnet.convert.rules.base import Site, Values, rule
from archnet.ops import Concat, Pad, Permute, Reshape


@rule(
    "aten.flatten.using_ints",
    "aten.unflatten.int",
    "aten.view.default",
    "aten.reshape.default",
    "aten._unsafe_view.default",
    "aten.squeeze.dims",
    "aten.squeeze.dim",
    "aten.unsqueeze.default",
)
def reshape(site: Site) -> Value:
    """The same values in another shape; every sample keeps its own."""
    value, shape = site.value(site.subject), site.node.shape
    if site.node.batch.axis < 0 or math.prod(shape) != math.prod(value.shape):
        raise site.error("moves values between the samples of a batch")
    if shape == value.shape:
        return value
    return site.builder.reshape(site.builder.build(value), shape)


# Which two axes an operator exchanges: arguments by name, or axes themselves.
_EXCHANGED: dict[str, tuple[str | int, str | int]] = {
    "aten.transpose.int": ("dim0", "dim1"),
    "aten.swapaxes.default": ("axis0", "axis1"),
    "aten.swapdims.default": ("dim0", "dim1"),
    "aten.mT.default": (-2, -1),
    "aten.adjoint.default": (-2, -1),
}


@rule("aten.permute.default", "aten.moveaxis.int", "aten.movedim.int", *_EXCHANGED)
def permute(site: Site) -> Value:
    """Axes in another order; one that only moves the batch does nothing to a sample."""
    rank, operator = site.batch.rank, site.node.operator
    if operator == "aten.permute.default":
        order = [d % rank for d in site.argument("dims")]
    elif operator in _EXCHANGED:
        order = list(range(rank))
        names = _EXCHANGED[operator]
        a, b = (site.argument(n) % rank if isinstance(n, str) else n % rank for n in names)
        order[a], order[b] = order[b], order[a]
    else:
        source, place = (site.argument(name) % rank for name in ("source", "destination"))
        order = [axis for axis in range(rank) if axis != source]
        order.insert(place, source)
    return site.builder.permuted(site.value("self"), site.batch.student_order(order))


@rule("aten.slice.Tensor")
def slicing(site: Site) -> Value:
    """x[start:stop:step] along one axis."""
    value = site.value("self")
    start, stop, step = (site.argument(key) for key in ("start", "end", "step"))
    if site.argument("dim") % site.batch.rank == site.batch.axis:
        if start in (None, 0) and (stop is None or stop >= 2**31) and step == 1:
            return value
        raise site.error("slices the batch")
    axis = site.axis(site.argument("dim"))
    bounds = slice(start, stop, step).indices(value.shape[axis - 1])
    return site.builder.slice(site.builder.build(value), axis, *bounds)


@rule("aten.select.int")
def select(site: Site) -> Value:
    """One entry of an axis, which goes: a slice of one and another shape."""
    feature, axis = site.feature("self"), site.axis(site.argument("dim"))
    index = site.argument("index") % feature.shape[axis - 1]
    return site.builder.reshape(
        site.builder.slice(feature, axis, index, index + 1), site.node.shape
    )


@rule("aten.chunk.default", "aten.split.Tensor", "aten.split_with_sizes.default")
def split(site: Site) -> Values:
    """Slices of one axis, side by side."""
    feature, axis = site.feature("self"), site.axis(site.argument("dim"))
    size = feature.shape[axis - 1]
    if "chunk" in site.node.operator:
        each: Sequence[int] | int = math.ceil(size / site.argument("chunks"))
    elif "sizes" in site.node.operator:
        each = site.argument("split_sizes")
    else:
        each = site.argument("split_size")
    if isinstance(each, int):
        each = [min(each, size - start) for start in range(0, size, each)]
    parts, start = [], 0
    for count in each:
        parts.append(site.builder.slice(feature, axis, start, start + count))
        start += count
    return [*parts]


@rule("aten.unbind.int")
def unbind(site: Site) -> Values:
    """The entries of an axis, which goes."""
    feature, axis = site.feature("self"), site.axis(site.argument("dim"))
    shape = (*feature.shape[: axis - 1], *feature.shape[axis:])
    return [
        site.builder.reshape(site.builder.slice(feature, axis, i, i + 1), shape)
        for i in range(feature.shape[axis - 1])
    ]


@rule("<built-in function getitem>")
def getitem(site: Site) -> Value:
    """One of several results."""
    reference, index = site.argument("0"), site.argument("1")
    assert isinstance(reference, Ref)
    found = site.values[reference.name]
    assert isinstance(found, list)
    return found[index]


@rule("aten.roll.default")
def roll(site: Site) -> Value:
    """What leaves an axis at one end comes in at the other: two slices, concatenated."""
    value, dims = site.value("self"), site.argument("dims")
    feature = site.builder.build(value)
    for shift, dim in zip(site.argument("shifts"), dims, strict=True):
        axis = site.axis(dim)
        size = feature.shape[axis - 1]
        if cut := -shift % size:
            ends = [
                site.builder.slice(feature, axis, cut, size),
                site.builder.slice(feature, axis, 0, cut),
            ]
            feature = joined(site, ends, axis)
    return feature


@rule("aten.flip.default")
def flip(site: Site) -> Value:
    """An axis from its end: slices of one, concatenated the other way round."""
    feature = site.feature("self")
    for dim in site.argument("dims"):
        axis = site.axis(dim)
        turned = range(feature.shape[axis - 1] - 1, -1, -1)
        feature = joined(site, [site.builder.slice(feature, axis, i, i + 1) for i in turned], axis)
    return feature


def joined(site: Site, features: Sequence[Feature], axis: int) -> Feature:
    """Concatenation along any axis of the student, channels or not."""
    builder, channels = site.builder, features[0].axis
    if axis == channels and all(f.axis == axis for f in features):
        return builder.concat(features)
    if len(features) == 1:
        return features[0]
    name = builder.emit("concat", Concat(axis), *map(builder.first, features))
    shape = resized(features[0].shape, axis, sum(f.shape[axis - 1] for f in features))
    return Feature(shape, first=name, axis=channels)


@rule("aten.stack.default")
def stacking(site: Site) -> Value:
    """Values side by side along an axis of their own."""
    axis = site.node.batch.student_axis(site.argument("dim"))
    if site.node.batch.axis < 0 or axis < 1:
        raise site.error("stacks along the batch")
    wide = []
    for item in site.argument("tensors"):
        feature = site.builder.build(site.referred(item))
        shape = (*feature.shape[: axis - 1], 1, *feature.shape[axis - 1 :])
        tall = site.builder.layout(feature, "stack", Reshape(shape))
        wide.append(Feature(shape, first=tall.first, axis=axis))
    return joined(site, wide, axis)


@rule("aten.pixel_shuffle.default")
def pixel_shuffle(site: Site) -> Value:
    """Channels (C r r) become r x r pixels."""
    r, (channels, rows, columns) = site.argument("upscale_factor"), site.node.shape
    return _rearranged(
        site, (channels, r, r, rows // r, columns // r), (0, 1, 4, 2, 5, 3), site.node.shape
    )


@rule("aten.pixel_unshuffle.default")
def pixel_unshuffle(site: Site) -> Value:
    """Pixels of r x r become channels (C r r)."""
    r, (channels, rows, columns) = site.argument("downscale_factor"), site.node.shape
    return _rearranged(
        site, (channels // r**2, rows, r, columns, r), (0, 1, 3, 5, 2, 4), site.node.shape
    )


def _rearranged(
    site: Site, split: tuple[int, ...], order: tuple[int, ...], shape: tuple[int, ...]
) -> Value:
    builder = site.builder
    parts = builder.layout(site.feature("self"), "split", Reshape(split))
    return builder.layout(
        builder.layout(parts, "order", Permute(order)), "shape", Reshape(shape), 1
    )


@rule("aten.upsample_nearest2d.vec")
def upsample_nearest(site: Site) -> Value:
    """Every pixel r x r times: copies side by side along axes of their own."""
    builder, (channels, rows, columns) = site.builder, site.node.shape
    feature = site.builder.build(site.tagged("input", 1))
    _, height, width = feature.shape
    if rows % height or columns % width:
        raise site.error(f"enlarges {height}x{width} to {rows}x{columns}; only whole factors do")
    spread = builder.layout(feature, "split", Reshape((channels, height, 1, width, 1)), 1)
    tall = joined(site, [spread] * (rows // height), 3)
    wide = joined(site, [tall] * (columns // width), 5)
    return builder.layout(wide, "shape", Reshape(site.node.shape), 1)


@rule("aten.upsample_bilinear2d.vec", "aten.upsample_bicubic2d.vec")
def upsample_linear(site: Site) -> Value:
    """A constant matrix over rows, then one over columns: what the operator makes of units."""
    builder = site.builder
    feature = site.builder.build(site.tagged("input", 1))
    mode = "bilinear" if "bilinear" in site.node.operator else "bicubic"
    factors = site.argument("scale_factors")
    for axis in (2, 3):
        size = feature.shape[axis - 1]
        units = torch.eye(size, dtype=torch.float64)[:, None, :, None]
        how: dict[str, Any] = {"size": (site.node.shape[axis - 1], 1)}
        if factors is not None:
            how = {"scale_factor": (float(factors[axis - 2]), 1.0)}
        response = F.interpolate(
            units, mode=mode, align_corners=site.argument("align_corners"), **how
        )
        matrix = response[:, 0, :, 0].T
        along = Feature(feature.shape, first=builder.first(feature), axis=axis)
        zeros = torch.zeros(len(matrix), dtype=torch.float64)
        feature = builder.matrix_at_positions(along, matrix, zeros)
    return Feature(feature.shape, first=builder.first(feature), axis=1)


@rule("aten.pad.default", "aten.constant_pad_nd.default")
def padding(site: Site) -> Value:
    """Zeros around the map, or further channels of zeros (the shortcut of CIFAR ResNets).

    Pixels that are repeated (`replicate`), mirrored or taken from the other side are slices,
    concatenated.
    """
    fill, mode = site.argument("value"), site.node.arguments.get("mode", "constant")
    if fill not in (None, 0, 0.0):
        raise site.error("pads with a number; only zeros have a rule")
    pads = list(site.argument("pad"))
    if any(count < 0 for count in pads):
        raise site.error("negative padding has no rule")
    if not any(pads):
        return site.value("self")
    feature = site.feature("self")
    if mode != "constant":
        for index in range(0, len(pads), 2):
            axis = site.axis(-1 - index // 2)
            feature = _filled(site, feature, axis, mode, pads[index], pads[index + 1])
        return feature
    full = [(0, 0)] * len(feature.shape)
    # Pairs count from the last axis.
    for index in range(0, len(pads), 2):
        if any(pair := (pads[index], pads[index + 1])):
            full[site.axis(-1 - index // 2) - 1] = pair
    return site.builder.layout(feature, "pad", Pad(tuple(full)), feature.axis)


def _filled(site: Site, feature: Feature, axis: int, mode: str, before: int, after: int) -> Feature:
    """An axis with pixels of its own on both sides."""
    size = feature.shape[axis - 1]
    if mode == "replicate":
        ahead, behind = [0] * before, [size - 1] * after
    elif mode == "circular":
        ahead, behind = list(range(size - before, size)), list(range(after))
    else:
        ahead = list(range(before, 0, -1))
        behind = list(range(size - 2, size - 2 - after, -1))
    parts = [site.builder.slice(feature, axis, i, i + 1) for i in ahead]
    ends = [site.builder.slice(feature, axis, i, i + 1) for i in behind]
    return joined(site, [*parts, feature, *ends], axis)


@rule(
    "aten.contiguous.default",
    "aten.clone.default",
    "aten.alias.default",
    "aten.detach.default",
    "aten.lift_fresh_copy.default",
)
def identity(site: Site) -> Value:
    """The same values."""
    return site.value(site.subject)
