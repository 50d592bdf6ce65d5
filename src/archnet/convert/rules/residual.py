"""Additions, constant scales and shifts, and concatenations (exact)."""

import torch
from torch import Tensor

from archnet.capture import Ref
from archnet.convert.feature import Value
from archnet.convert.rules.base import Site, affine, as_form, constant, number, rule
from archnet.convert.rules.gating import gate
from archnet.convert.rules.layout import joined, stretched
from archnet.ops import Pad


@rule(
    "aten.add.Tensor",
    "aten.add_.Tensor",
    "aten.sub.Tensor",
    "aten.sub_.Tensor",
    "aten.rsub.Scalar",
)
def addition(site: Site) -> Value:
    """Y = a + alpha b, read as one linear form with the terms of both.

    Built by `Builder.build`: matrices at the same positions join in one layer over the
    concatenated features, [W_a, W_b] [a; b]; whatever stays is concatenated and added by
    [I, I] [a; b]. A constant goes into the bias, one for every element (a table of positions)
    into a batch norm over the flattened elements.
    """
    first, second = site.argument("self"), site.argument("other")
    sign = -1.0 if "sub" in site.node.operator else 1.0
    factors = (1.0, sign * float(site.argument("alpha")))
    if "rsub" in site.node.operator:
        factors = factors[::-1]
    features = [
        scaled(site.referred(item), number(factor))
        for item, factor in zip((first, second), factors, strict=True)
        if isinstance(item, Ref)
    ]
    if len(features) == 1:
        (item, factor) = (first, factors[0]) if second.__class__ is Ref else (second, factors[1])
        shift = number(item) if isinstance(item, int | float) else constant(item)
        return affine(site, features[0], number(1.0), factor * shift)
    form, addend = (stretched(site, feature) for feature in features)
    tagged = as_form(site.builder.tagged(addend, form.axis))
    return as_form(form).plus(tagged)


@rule("aten.lerp.Scalar")
def interpolation(site: Site) -> Value:
    """Y = (1 - w) a + w b."""
    weight = float(site.argument("weight"))
    a = as_form(stretched(site, scaled(site.value("self"), number(1 - weight))))
    b = stretched(site, scaled(site.value("end"), number(weight)))
    return a.plus(as_form(site.builder.tagged(b, a.axis)))


@rule("aten.addcmul.default")
def scaled_addition(site: Site) -> Value:
    """Y = a + v b c, of which b or c is a constant, and a may be one."""
    parts = [site.argument(name) for name in ("tensor1", "tensor2")]
    factors = [constant(item) for item in parts if not isinstance(item, Ref)]
    if len(factors) != 1:
        raise site.error("adds a product of two features: write it as a + b * c")
    (feature,) = [item for item in parts if isinstance(item, Ref)]
    scale = factors[0] * float(site.node.arguments.get("value", 1.0))
    product = affine(site, stretched(site, site.referred(feature)), scale, number(0.0))
    addend = site.argument("self")
    if not isinstance(addend, Ref):
        return affine(site, product, number(1.0), constant(addend))
    tagged = site.builder.tagged(stretched(site, site.referred(addend)), product.axis)
    return as_form(product).plus(as_form(tagged))


@rule("aten.mul.Tensor", "aten.mul_.Tensor", "aten.div.Tensor", "aten.div_.Tensor")
def scaling(site: Site) -> Value:
    """Y = c x for a number or a constant tensor (layer scale): goes into the weights.

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
    """Y = -x."""
    return affine(site, site.value("self"), number(-1.0), number(0.0))


def scaled(value: Value, factor: Tensor) -> Value:
    return value if factor == 1 else as_form(value).affine(factor, number(0.0))


@rule("aten.cat.default")
def concatenation(site: Site) -> Value:
    """Y = [x_1; x_2; ...] along any axis but the batch.

    A constant at either end (a class token) is a padding with zeros, and then a shift.
    """
    items, batch = site.argument("tensors"), site.node.batch
    axis = site.axis(int(site.argument("dim")))
    places = [i for i, item in enumerate(items) if isinstance(item, Ref)]
    features = [site.builder.build(site.referred(items[i])) for i in places]
    value = joined(site, features, axis)
    if len(places) == len(items):
        return value
    if places != list(range(places[0], places[-1] + 1)):
        raise site.error("joins constants between features; only the ends have a rule")
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
