"""Layout moves of the teacher (exact): they compute nothing. And changes of size."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from archnet.capture import Ref
from archnet.convert.feature import Feature, Value
from archnet.convert.rules.base import (
    Site,
    Values,
    at_each,
    at_elements,
    by_map,
    joined,
    rule,
    stretched,
)
from archnet.ops import Pad, Permute, Reshape, layout


@rule(
    "aten.flatten.using_ints",
    "aten.unflatten.int",
    "aten.view.default",
    "aten.reshape.default",
    "aten._unsafe_view.default",
    "aten.view_as.default",
    "aten.reshape_as.default",
    "aten.squeeze.default",
    "aten.squeeze.dims",
    "aten.squeeze.dim",
    "aten.unsqueeze.default",
)
def reshape(site: Site) -> Value:
    """The same values in another shape; every sample keeps its own."""
    value, shape = site.value(site.subject), site.node.shape
    if math.prod(shape) != math.prod(value.shape):
        raise site.error("moves values between the samples of a batch: keep the batch an axis")
    if shape == value.shape:
        return value
    return site.builder.reshape(site.builder.build(value), shape)


# Which two axes an operator exchanges: arguments by name, or axes themselves.
_EXCHANGED: dict[str, tuple[str | int, str | int]] = {
    "aten.transpose.int": ("dim0", "dim1"),
    "aten.swapaxes.default": ("axis0", "axis1"),
    "aten.swapdims.default": ("dim0", "dim1"),
    "aten.t.default": (0, -1),
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
        raise site.error("slices the batch: a student works on one sample at a time")
    axis = site.axis(site.argument("dim"))
    bounds = slice(start, stop, step).indices(value.shape[axis - 1])
    if bounds[2] == 1:
        return site.builder.part(site.builder.build(value), axis, *bounds[:2])
    return site.builder.slice(site.builder.build(value), axis, *bounds)


@rule("aten.select.int")
def select(site: Site) -> Value:
    """One entry of an axis, which goes: a slice of one and another shape."""
    feature, axis = site.feature("self"), site.axis(site.argument("dim"))
    index = site.argument("index") % feature.shape[axis - 1]
    return site.builder.reshape(site.builder.part(feature, axis, index, index + 1), site.node.shape)


@rule("aten.narrow.default")
def narrow(site: Site) -> Value:
    """So many entries of an axis, from one on."""
    feature, axis = site.feature("self"), site.axis(site.argument("dim"))
    start = site.argument("start") % feature.shape[axis - 1]
    return site.builder.part(feature, axis, start, start + site.argument("length"))


# The axis of an operator that says it by its name.
_NAMED_AXES = {"hsplit": 1, "vsplit": 0, "dsplit": 2}


@rule(
    "aten.chunk.default",
    "aten.split.Tensor",
    "aten.split_with_sizes.default",
    "aten.tensor_split.sections",
    "aten.tensor_split.indices",
    *(f"aten.{name}.{kind}" for name in _NAMED_AXES for kind in ("int", "array")),
)
def split(site: Site) -> Values:
    """Slices of one axis, side by side."""
    name = site.node.operator.split(".")[1]
    axis = site.axis(_NAMED_AXES[name] if name in _NAMED_AXES else site.argument("dim"))
    feature = site.feature("self")
    bounds = [0, *_ends(site, name, feature.shape[axis - 1])]
    return [site.builder.part(feature, axis, *pair) for pair in itertools.pairwise(bounds)]


def _ends(site: Site, name: str, size: int) -> list[int]:
    """Where each part of an axis of so many entries ends."""
    if name == "split_with_sizes":
        return list(itertools.accumulate(site.argument("split_sizes")))
    if name in ("chunk", "split"):
        each = -(-size // site.argument("chunks")) if name == "chunk" else None
        each = each or site.argument("split_size")
        return [min(start + each, size) for start in range(0, size, each)]
    if "indices" not in site.node.arguments:
        count = site.argument("sections")
        # The first ones have one entry more where it does not come out even.
        sizes = [size // count + (part < size % count) for part in range(count)]
        return list(itertools.accumulate(sizes))
    return [*(slice(end).indices(size)[1] for end in site.argument("indices")), size]


@rule("aten.unbind.int")
def unbind(site: Site) -> Values:
    """The entries of an axis, which goes."""
    feature, axis = site.feature("self"), site.axis(site.argument("dim"))
    shape = (*feature.shape[: axis - 1], *feature.shape[axis:])
    return [
        site.builder.reshape(site.builder.part(feature, axis, i, i + 1), shape)
        for i in range(feature.shape[axis - 1])
    ]


@rule("<built-in function getitem>")
def getitem(site: Site) -> Value:
    """One of several results."""
    reference, index = site.argument("0"), site.argument("1")
    assert isinstance(reference, Ref)
    found = site.values[reference.name]
    assert isinstance(found, list)
    if index >= len(found):
        raise site.error(
            "returns the indices of maxima, which layers cannot: end the network before it, and "
            "compute them from the student's result"
        )
    return found[index]


@rule("aten.roll.default")
def roll(site: Site) -> Value:
    """What leaves an axis at one end comes in at the other: two slices, concatenated."""
    value, dims = site.value("self"), site.argument("dims")
    if not dims:
        raise site.error("rolls values from one sample into the next: give dims")
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


@rule("aten.flip.default", "aten.fliplr.default", "aten.flipud.default")
def flip(site: Site) -> Value:
    """An axis from its end: slices of one, concatenated the other way round."""
    named = {"aten.fliplr.default": [1], "aten.flipud.default": [0]}
    dims = named.get(site.node.operator) or site.argument("dims")
    return _flipped(site, site.feature("self"), map(site.axis, dims))


def _flipped(site: Site, feature: Feature, axes: Iterable[int]) -> Feature:
    for axis in axes:
        feature = picked(site, feature, axis, range(feature.shape[axis - 1] - 1, -1, -1))
    return feature


@rule("aten.rot90.default")
def quarter_turns(site: Site) -> Value:
    """Turn k times by a quarter, from the first axis towards the second.

    A turn is made of flips, and of an exchange of the axes where k is odd.
    """
    turns, (first, second) = site.argument("k") % 4, site.argument("dims")
    turned = {0: [], 1: [second], 2: [first, second], 3: [first]}[turns]
    feature = _flipped(site, site.feature("self"), map(site.axis, turned))
    if turns % 2 == 0:
        return feature
    order = list(range(site.batch.rank))
    order[first], order[second] = order[second], order[first]
    return site.builder.permuted(feature, site.batch.student_order(order))


@rule("aten.index_select.default", "aten.index.Tensor")
def indexed(site: Site) -> Value:
    """Entries of one axis in the order of a constant: slices, concatenated."""
    if "indices" in site.node.arguments:
        places = [(d, i) for d, i in enumerate(site.argument("indices")) if i is not None]
    else:
        places = [(site.argument("dim"), site.argument("index"))]
    (dim, index), *others = places
    if others or not isinstance(index, Tensor):
        raise site.error(
            "selects entries by several indices or by a feature; only one constant index has a "
            "rule: end the network before it, or write slices"
        )
    feature, axis = site.feature("self"), site.axis(dim)
    order = torch.arange(feature.shape[axis - 1])[index.cpu()]
    entries = picked(site, feature, axis, order.flatten().tolist())
    return entries if order.dim() == 1 else site.builder.reshape(entries, site.node.shape)


def picked(site: Site, feature: Feature, axis: int, order: Sequence[int]) -> Feature:
    """Entries of an axis in some order; neighbours that stay neighbours are one slice."""
    starts = [i for i, item in enumerate(order) if not i or item != order[i - 1] + 1]
    runs = [(order[a], order[b - 1] + 1) for a, b in itertools.pairwise([*starts, len(order)])]
    return joined(site, [site.builder.slice(feature, axis, *run) for run in runs], axis)


@rule("aten.expand.default", "aten.expand_as.default", "aten.broadcast_to.default")
def expansion(site: Site) -> Value:
    """Copies along axes of one entry."""
    return stretched(site, site.value("self"))


@rule("aten.repeat.default", "aten.tile.default")
def repetition(site: Site) -> Value:
    """An axis several times, one after another."""
    counts = site.argument("repeats" if "repeat" in site.node.operator else "dims")
    counts = [*[1] * (site.batch.rank - len(counts)), *counts]
    if len(counts) > site.batch.rank:
        raise site.error("adds axes in front of the batch: write unsqueeze, and expand it")
    value = site.value("self")
    for dim, count in enumerate(counts):
        if count != 1:
            axis = site.axis(dim)
            value = joined(site, [site.builder.build(value)] * count, axis)
    return value


@rule("aten.repeat_interleave.self_int")
def interleaved_repetition(site: Site) -> Value:
    """Every entry of an axis several times: copies along an axis of their own."""
    count, dim = site.argument("repeats"), site.argument("dim")
    if dim is None:
        raise site.error("flattens the batch: give dim")
    feature, axis = site.feature("self"), site.axis(dim)
    shape = (*feature.shape[:axis], 1, *feature.shape[axis:])
    tall = site.builder.layout(feature, "split", Reshape(shape), axis)
    copies = joined(site, [tall] * count, axis + 1)
    return site.builder.layout(copies, "shape", Reshape(site.node.shape), feature.axis)


@rule("aten.channel_shuffle.default", "aten.native_channel_shuffle.default")
def channel_shuffle(site: Site) -> Value:
    """Channels (G C/G) become (C/G G)."""
    groups, (channels, *others) = site.argument("groups"), site.node.shape
    order = (0, 2, 1, *range(3, 3 + len(others)))
    return _rearranged(site, (groups, channels // groups, *others), order, site.node.shape)


@rule("aten.stack.default")
def stacking(site: Site) -> Value:
    """Values side by side along an axis of their own."""
    axis = site.node.batch.student_axis(site.argument("dim"))
    refs = [item for item in site.argument("tensors") if isinstance(item, Ref)]
    shape, batch = site.referred(refs[0]).shape, site.batch
    one = replace(site.node, shape=shape, batch=batch)
    features = [
        site.builder.build(
            site.referred(item)
            if isinstance(item, Ref)
            else site.builder.constant(at_elements(one, item))
        )
        for item in site.argument("tensors")
    ]
    return stacked(site, features, axis)


def stacked(site: Site, features: Sequence[Feature], axis: int) -> Feature:
    """Features of one shape side by side along an axis of their own."""
    wide = []
    for feature in features:
        shape = (*feature.shape[: axis - 1], 1, *feature.shape[axis - 1 :])
        tall = site.builder.layout(feature, "stack", Reshape(shape))
        wide.append(Feature(shape, first=tall.first, axis=axis))
    return joined(site, wide, axis)


@rule("aten.im2col.default")
def windows(site: Site) -> Value:
    """The kh kw pixels of every window of a map: (C kh kw, windows)."""
    site.require_batch_ahead(3)
    pair, builder = site.pair, site.builder
    rows, columns = pair("padding")
    padded = builder.pad(site.feature("self"), (rows, rows), (columns, columns))
    window = (pair(name) for name in ("kernel_size", "stride", "dilation"))
    views = layout.windows(builder.slice, padded, padded.shape, *window)
    return builder.reshape(stacked(site, views, 2), site.node.shape)


@rule("aten.unfold.default")
def windows_of_axis(site: Site) -> Value:
    """The entries of every window along an axis, as the last axis."""
    axis, size, step = (site.argument(name) for name in ("dimension", "size", "step"))
    axis, feature = site.axis(axis), site.feature("self")
    span = (site.node.shape[axis - 1] - 1) * step + 1
    views = [site.builder.slice(feature, axis, at, at + span, step) for at in range(size)]
    return stacked(site, views, len(site.node.shape))


@rule("aten.pixel_shuffle.default")
@by_map
def pixel_shuffle(site: Site) -> Value:
    """Channels (C r r) become r x r pixels."""
    r, (channels, rows, columns) = site.argument("upscale_factor"), site.node.shape
    return _rearranged(
        site, (channels, r, r, rows // r, columns // r), (0, 1, 4, 2, 5, 3), site.node.shape
    )


@rule("aten.pixel_unshuffle.default")
@by_map
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
@by_map
def upsample_nearest(site: Site) -> Value:
    """Every pixel r x r times: copies side by side along axes of their own."""
    builder, (channels, rows, columns) = site.builder, site.node.shape
    feature = site.builder.build(site.tagged("input", 1))
    _, height, width = feature.shape
    if rows % height or columns % width:
        raise site.error(
            f"upsamples {height}x{width} to {rows}x{columns}; only whole factors have a rule"
        )
    spread = builder.layout(feature, "split", Reshape((channels, height, 1, width, 1)), 1)
    tall = joined(site, [spread] * (rows // height), 3)
    wide = joined(site, [tall] * (columns // width), 5)
    return builder.layout(wide, "shape", Reshape(site.node.shape), 1)


@rule("aten.upsample_bilinear2d.vec", "aten.upsample_bicubic2d.vec")
@by_map
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
        feature = builder.matrix_at_positions(along, matrix, zeros, trainable=False)
    return Feature(feature.shape, first=builder.first(feature), axis=1)


@rule("aten.pad.default", "aten.constant_pad_nd.default")
def padding(site: Site) -> Value:
    """Zeros around the map, or further channels of zeros (the shortcut of CIFAR ResNets).

    Another number is a shift. Pixels that are repeated (`replicate`), mirrored or taken from the
    other side are slices, concatenated.
    """
    fill, mode = site.argument("value"), site.node.arguments.get("mode", "constant")
    pads = list(site.argument("pad"))
    if any(count < 0 for count in pads):
        raise site.error("is padded by less than nothing: write a slice")
    if not any(pads):
        return site.value("self")
    feature = site.feature("self")
    if mode != "constant":
        for index in range(0, len(pads), 2):
            axis = site.axis(-1 - index // 2)
            feature = filled(site, feature, axis, mode, pads[index], pads[index + 1])
        return feature
    full = [(0, 0)] * len(feature.shape)
    # Pairs count from the last axis.
    for index in range(0, len(pads), 2):
        if any(pair := (pads[index], pads[index + 1])):
            full[site.axis(-1 - index // 2) - 1] = pair
    padded = site.builder.layout(feature, "pad", Pad(tuple(full)), feature.axis)
    if not fill:
        return padded
    inside = torch.zeros(feature.shape, dtype=torch.float64)
    flat = [count for pair in full[::-1] for count in pair]
    shift = F.pad(inside, flat, value=float(fill))
    return at_each(site, padded, torch.stack([torch.ones_like(shift), shift]))


def filled(site: Site, feature: Feature, axis: int, mode: str, before: int, after: int) -> Feature:
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


@rule(
    "aten.to.dtype",
    "aten.to.device",
    "aten.to.dtype_layout",
    "aten.to.other",
    "aten.type_as.default",
    "aten._to_copy.default",
)
def cast(site: Site) -> Value:
    """The same values, as long as they stay floating-point numbers."""
    if not site.node.floating:
        raise site.error(
            "casts a feature to integers, which layers cannot: end the network before it"
        )
    return site.value("self")
