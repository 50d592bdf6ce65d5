"""Layout moves of the teacher (exact): they compute nothing."""

import math
from collections.abc import Sequence

from archnet.capture import Ref
from archnet.convert.feature import Feature, Value, resized
from archnet.convert.rules.base import Site, Values, rule
from archnet.ops import Concat, Pad


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


@rule("aten.permute.default", "aten.transpose.int", "aten.swapaxes.default")
def permute(site: Site) -> Value:
    """Axes in another order; one that only moves the batch does nothing to a sample."""
    rank = site.batch.rank
    if site.node.operator == "aten.permute.default":
        order = [d % rank for d in site.argument("dims")]
    else:
        order = list(range(rank))
        names = ("dim0", "dim1") if "transpose" in site.node.operator else ("axis0", "axis1")
        a, b = (site.argument(name) % rank for name in names)
        order[a], order[b] = order[b], order[a]
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


@rule("aten.pad.default", "aten.constant_pad_nd.default")
def zero_padding(site: Site) -> Value:
    """Zeros around the map, or further channels of zeros (the shortcut of CIFAR ResNets)."""
    fill = site.argument("value")
    if site.node.arguments.get("mode", "constant") != "constant" or fill not in (None, 0, 0.0):
        raise site.error("only padding with zeros has a rule")
    pads = list(site.argument("pad"))
    if any(count < 0 for count in pads):
        raise site.error("negative padding has no rule")
    if not any(pads):
        return site.value("self")
    feature = site.feature("self")
    full = [(0, 0)] * len(feature.shape)
    # Pairs count from the last axis.
    for index in range(0, len(pads), 2):
        if any(pair := (pads[index], pads[index + 1])):
            full[site.axis(-1 - index // 2) - 1] = pair
    return site.builder.layout(feature, "pad", Pad(tuple(full)), feature.axis)


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
