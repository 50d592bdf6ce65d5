"""Layout moves of the teacher (exact): they compute nothing."""

import math

from archnet.convert.feature import Value
from archnet.convert.rules.base import Site, rule
from archnet.ops import Pad, Permute, Reshape


@rule(
    "aten.flatten.using_ints",
    "aten.view.default",
    "aten.reshape.default",
    "aten.squeeze.dims",
    "aten.squeeze.dim",
    "aten.unsqueeze.default",
)
def reshape(site: Site) -> Value:
    """The same values in another shape; every sample keeps its own."""
    feature = site.feature(site.subject)
    shape = site.node.shape
    if math.prod(shape) != math.prod(feature.shape):
        raise site.error("moves values between the samples of a batch")
    if shape == feature.shape:
        return feature
    return site.builder.layout(feature, "reshape", Reshape(shape))


@rule("aten.permute.default", "aten.transpose.int")
def permute(site: Site) -> Value:
    """Axes in another order; the batch stays first."""
    feature = site.feature("self")
    rank = len(feature.shape) + 1
    if site.node.operator == "aten.permute.default":
        order = [d % rank for d in site.argument("dims")]
    else:
        order = list(range(rank))
        a, b = site.argument("dim0") % rank, site.argument("dim1") % rank
        order[a], order[b] = order[b], order[a]
    if order[0] != 0:
        raise site.error("moves the batch axis")
    return site.builder.layout(feature, "permute", Permute(tuple(order)))


@rule("aten.slice.Tensor")
def slicing(site: Site) -> Value:
    """x[start:stop:step] along one axis."""
    value = site.value("self")
    axis, rank = site.argument("dim"), len(value.shape) + 1
    axis %= rank
    start, stop, step = (site.argument(key) for key in ("start", "end", "step"))
    if axis == 0:
        if start in (None, 0) and (stop is None or stop >= 2**31) and step == 1:
            return value
        raise site.error("slices the batch")
    start, stop, step = slice(start, stop, step).indices(value.shape[axis - 1])
    feature = site.builder.build(value)
    return site.builder.slice(feature, axis, start, stop, step)


@rule("aten.pad.default", "aten.constant_pad_nd.default")
def zero_padding(site: Site) -> Value:
    """Zeros around the map, or further channels of zeros (the shortcut of CIFAR ResNets)."""
    fill = site.argument("value")
    if site.node.arguments.get("mode", "constant") != "constant" or fill not in (None, 0, 0.0):
        raise site.error("only padding with zeros has a rule")
    feature, pads = site.feature("self"), list(site.argument("pad"))
    if any(count < 0 for count in pads):
        raise site.error("negative padding has no rule")
    pairs = [(pads[i], pads[i + 1]) for i in range(0, len(pads), 2)]
    full = [(0, 0)] * (len(feature.shape) - len(pairs)) + pairs[::-1]
    if not any(map(any, full)):
        return feature
    return site.builder.layout(feature, "pad", Pad(tuple(full)))


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
