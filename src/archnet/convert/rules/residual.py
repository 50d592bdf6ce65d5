"""Additions, constant scales and shifts, and concatenations (exact)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from archnet.capture import Ref
from archnet.convert.feature import Value
from archnet.convert.rules.base import (
    Site,
    affine,
    as_form,
    constant,
    joined,
    number,
    rule,
)
from archnet.convert.rules.gating import gate
from archnet.ops import Pad


@rule(
    "aten.add.Tensor",
    "aten.sub.Tensor",
    "aten.rsub.Scalar",
)
def addition(site: Site) -> Value:
    """y = a + alpha b, read as one linear form with the terms of both.

    Built by `Builder.build`: matrices at the same positions join in one layer over the
    concatenated features, [W_a, W_b] [a; b]; whatever stays is concatenated and added by
    [I, I] [a; b]. A constant goes into the bias, one for every element (a table of positions)
    is an addition of its own.
    """
    first, second = site.argument("self"), site.argument("other")
    sign = -1.0 if "sub" in site.node.operator else 1.0
    factors = (number(1.0), number(sign * float(site.argument("alpha"))))
    if "rsub" in site.node.operator:
        factors = factors[::-1]
    return weighted_sum(site, (first, second), factors)


def weighted_sum(site: Site, items: Sequence[Any], weights: Sequence[Tensor]) -> Value:
    """Sum_i w_i x_i of features, constants and numbers, of constant weights, all broadcast."""
    total, shift = None, number(0.0)
    for item, weight in zip(items, weights, strict=True):
        if not isinstance(item, Ref):
            shift = shift + weight * constant(torch.as_tensor(item))
            continue
        value = affine(site, site.referred(item), weight, number(0.0))
        if total is None:
            total = value
        else:
            total = as_form(total).plus(as_form(site.builder.tagged(value, total.axis)))
    assert total is not None
    return affine(site, total, number(1.0), shift)


@rule("aten.lerp.Scalar", "aten.lerp.Tensor")
def interpolation(site: Site) -> Value:
    """y = (1 - w) a + w b for a constant w."""
    weight = site.fixed("weight")
    assert weight is not None
    return weighted_sum(site, [site.argument("self"), site.argument("end")], [1 - weight, weight])


@rule("aten.addcmul.default", "aten.addcdiv.default")
def scaled_addition(site: Site) -> Value:
    """y = a + v b c, or a + v b / c, of which b or c is a constant, and a may be one."""
    first, second = (site.argument(name) for name in ("tensor1", "tensor2"))
    is_ratio = "div" in site.node.operator
    if isinstance(second, Ref) and (is_ratio or isinstance(first, Ref)):
        raise site.error(
            f"adds a {'ratio' if is_ratio else 'product'} of two features: write it as "
            f"a + b {'/' if is_ratio else '*'} c"
        )
    if not isinstance(first, Ref):
        first, second = second, first
    factor = constant(second)
    scale = float(site.node.arguments.get("value", 1.0)) * (1 / factor if is_ratio else factor)
    return weighted_sum(site, [site.argument("self"), first], [number(1.0), scale])


@rule("aten.where.self", "aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def choice(site: Site) -> Value:
    """Entries of two values by a constant mask m: y = m a + (1 - m) b."""
    is_fill = "fill" in site.node.operator
    name, first, second = ("mask", "value", "self") if is_fill else ("condition", "self", "other")
    if isinstance(site.argument(name), Ref):
        raise site.error(
            "selects by a comparison of features, which is not continuous: write it with relu, "
            "clamp, maximum or a sigmoid, or end the network before it"
        )
    mask = site.fixed(name)
    assert mask is not None
    items = [site.argument(first), site.argument(second)]
    return weighted_sum(site, items, [mask, 1 - mask])


@rule("aten.mul.Tensor", "aten.div.Tensor")
def scaling(site: Site) -> Value:
    """y = c x for a number or a constant tensor (layer scale): goes into the weights.

    A product of two features is a gate; see `archnet.convert.rules.gating`.
    """
    first, second = site.argument("self"), site.argument("other")
    if isinstance(first, Ref) and isinstance(second, Ref):
        return gate(site)
    feature, factor = (first, second) if isinstance(first, Ref) else (second, first)
    scale = number(factor) if isinstance(factor, int | float) else constant(factor)
    if "div" in site.node.operator:
        scale = 1 / scale
    return affine(site, site.referred(feature), scale, number(0.0))


@rule("aten.neg.default")
def negation(site: Site) -> Value:
    """y = -x."""
    return affine(site, site.value("self"), number(-1.0), number(0.0))


@rule("aten.cat.default")
def concatenation(site: Site) -> Value:
    """y = [x_1; x_2; ...] along any axis but the batch.

    A constant at either end (a class token) is a padding with zeros, and then a shift; one between
    features is a value of its own.
    """
    items, batch = site.argument("tensors"), site.node.batch
    axis = site.axis(int(site.argument("dim")))
    places = [i for i, item in enumerate(items) if isinstance(item, Ref)]
    inner = items[places[0] : places[-1] + 1]
    value = joined(site, [site.builder.build(site.operand(item)) for item in inner], axis)
    if len(inner) == len(items):
        return value
    dim = int(site.argument("dim")) % batch.rank
    ahead, behind = items[: places[0]], items[places[-1] + 1 :]
    pads = [(0, 0)] * len(value.shape)
    pads[axis - 1] = (sum(t.shape[dim] for t in ahead), sum(t.shape[dim] for t in behind))
    padded = site.builder.layout(value, "pad", Pad(tuple(pads)), value.axis)
    single = list(ahead[0].shape if ahead else behind[0].shape)
    single[dim] = value.shape[axis - 1]
    middle = torch.zeros(single, dtype=torch.float64)
    shift = torch.cat([*map(constant, ahead), middle, *map(constant, behind)], dim)
    return affine(site, padded, number(1.0), shift)
