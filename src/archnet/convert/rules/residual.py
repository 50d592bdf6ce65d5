"""Additions, constant scales and concatenations (exact)."""

import torch

from archnet.capture import Ref
from archnet.convert.feature import Value
from archnet.convert.rules.base import Site, rule


@rule("aten.add.Tensor", "aten.add_.Tensor", "aten.sub.Tensor", "aten.sub_.Tensor")
def addition(site: Site) -> Value:
    """Y = a + alpha b, read as one linear form with the terms of both.

    Built by `Builder.build`: matrices at the same positions join in one layer over the
    concatenated features, [W_a, W_b] [a; b]; whatever stays is concatenated and added by
    [I, I] [a; b]. A constant addend goes into the bias.
    """
    sign = -1.0 if "sub" in site.node.operator else 1.0
    factor = sign * float(site.argument("alpha"))
    other = site.argument("other")
    form = site.form("self")
    if isinstance(other, int | float):
        return form.affine(_vector(1.0), _vector(factor * other))
    if not isinstance(other, Ref):
        raise site.error("adds a constant tensor; write a rule in rules/residual.py")
    addend = site.form("other")
    if addend.shape != form.shape:
        raise site.error(f"adds shapes {form.shape} and {addend.shape}; broadcast has no rule")
    if factor != 1.0:
        addend = addend.affine(_vector(factor), _vector(0.0))
    return form.plus(addend)


@rule("aten.mul.Tensor", "aten.mul_.Tensor", "aten.div.Tensor", "aten.div_.Tensor")
def constant_scale(site: Site) -> Value:
    """Y = c x for a number c: goes into the weights before or after."""
    other = site.argument("other")
    if not isinstance(other, int | float):
        raise site.error("multiplies two features; write a rule in rules/gating.py")
    factor = 1.0 / other if "div" in site.node.operator else float(other)
    return site.form("self").affine(_vector(factor), _vector(0.0))


@rule("aten.cat.default")
def concatenation(site: Site) -> Value:
    """Y = [x_1; x_2; ...] along the channels (or any axis but the batch)."""
    features = [site.builder.build(site.values[ref.name]) for ref in site.argument("tensors")]
    axis = int(site.argument("dim")) % (len(site.node.shape) + 1)
    if axis != features[0].channel_axis:
        raise site.error(f"concatenates along axis {axis}; only channels have a rule")
    return site.builder.concat(features)


def _vector(value: float) -> torch.Tensor:
    return torch.full((1,), value, dtype=torch.float64)
