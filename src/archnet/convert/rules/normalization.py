"""Batch norm in eval mode (exact); layer and group norm (approximate)."""

import math

import torch
from torch import Tensor

from archnet.convert.builder import Builder
from archnet.convert.feature import Feature, Value
from archnet.convert.fit import TokenNorm, regression, relative_error, rows, token_norm
from archnet.convert.rules.activation import absolute
from archnet.convert.rules.base import (
    Alternative,
    Site,
    affine,
    as_form,
    number,
    rule,
    scaled_to_fit,
)
from archnet.convert.rules.pooling import summed
from archnet.ops import Activation, Concat, LayerNorm, Reshape


@rule("aten.batch_norm.default", "aten._native_batch_norm_legit_no_training.default")
def batch_norm(site: Site) -> Value:
    """y = (x - mean) / sqrt(var + eps) * gamma + beta: a scale and a shift for every channel.

    Behind a convolution or linear layer they go into its weights; in front of a padded
    convolution they become a batch norm operator.
    """
    if site.argument("running_mean") is None or site.node.arguments.get("training"):
        raise site.error(
            "has no running statistics: leave track_running_stats=True, and call .eval() on the "
            "teacher"
        )
    mean, variance, weight, offset = (
        site.fixed(name) for name in ("running_mean", "running_var", "weight", "bias")
    )
    assert mean is not None
    assert variance is not None
    scale = torch.rsqrt(variance + site.argument("eps"))
    scale = scale if weight is None else scale * weight
    bias = -mean * scale
    bias = bias if offset is None else bias + offset
    return as_form(site.tagged("input", site.axis(1))).affine(scale, bias)


@rule("aten.layer_norm.default", "aten.rms_norm.default")
def layer_norm(site: Site) -> Value:
    """y = (x - E[x]) / sqrt(V[x]) * gamma + beta over a token, in a compact or a faithful form.

    Compact, nearly a batch norm: mean and deviation of every token give way to one scale and one
    shift for every channel (the paper's section on Transformers; PowerNorm, Shen et al. 2020, arXiv
    2003.07845), here by least squares against the teacher's own result. It folds, at no cost.

    Faithful: the mean is a layer over the channels, the deviation nearly a weighted sum of
    |x - mean|, and the quotient of two numbers nearly a sum of hinges in both (`fit.TokenNorm`);
    scale and shift follow by least squares. An RMS norm (Zhang & Sennrich 2019, arXiv 1910.07467)
    is the same without the mean. It is taken where it leaves less than `_WORTH` of the compact
    form's error, and a budget does not forbid it. A target that has the operator keeps it (exact).
    """
    site.require_batch_ahead(len(site.argument("normalized_shape")))
    if len(site.argument("normalized_shape")) != 1:
        return _over_several_axes(site)
    value = site.tagged("input", len(site.node.shape))
    if site.builder.keeps("layernorm") and "layer" in site.node.operator:
        return _kept(site, site.builder.build(value))
    count, builder = site.approximation.norm_hinges, site.builder
    if not count or site.is_compact or not builder.target.fc_per_position:
        return scaled_to_fit(site, value)
    given = site.given(value)
    x, wanted = given.flatten(0, -2), site.wanted().flatten(0, -2)
    slopes, offset = regression([x.T], wanted.T)
    compact = relative_error((x * slopes[:, 0].to(x)).add_(offset), wanted)
    norm = token_norm(x, _normalised(site, wanted), count, "layer" in site.node.operator)
    normed = norm(x)
    slopes, offset = regression([normed.T], wanted.T)
    faithful = relative_error((normed * slopes[:, 0].to(normed)).add_(offset), wanted)
    if faithful >= _WORTH * compact:
        return scaled_to_fit(site, value)
    site.alternative = Alternative(tuple(site.node.refs()), compact, faithful)
    feature = _token_norm(builder, builder.build(value), norm)
    site.hold(feature, normed.reshape(given.shape))
    return as_form(feature).affine(slopes[:, 0], offset)


_WORTH = 0.85


def _kept(site: Site, x: Feature) -> Feature:
    """The norm as the target's own operator, channels last."""
    builder = site.builder
    module = LayerNorm(x.channels, float(site.argument("eps")))
    with torch.no_grad():
        for name, parameter in (("weight", module.weight), ("bias", module.bias)):
            given = site.fixed(name)
            if given is not None:
                parameter.copy_(given)
    return builder.from_last(x.shape, x.axis, builder.emit("norm", module, builder.last(x)))


def _normalised(site: Site, wanted: Tensor) -> Tensor:
    """The teacher's result (..., *axes) before its own scale and shift."""
    for name, undo in (("bias", torch.sub), ("weight", torch.div)):
        scale = site.fixed(name)
        if scale is not None:
            wanted = undo(wanted, torch.where(scale.abs() < 1e-6, 1e-6, scale))
    return wanted


def _over_several_axes(site: Site) -> Value:
    """The compact form for channels; the teacher's scale and shift of every element behind it."""
    value = site.tagged("input", 1)
    x, wanted = (rows(y, 1) for y in (site.given(value), _normalised(site, site.wanted())))
    slopes, offset = regression([x], wanted)
    weight, bias = (site.fixed(name) for name in ("weight", "bias"))
    return affine(
        site,
        as_form(value).affine(slopes[:, 0], offset),
        number(1.0) if weight is None else weight,
        number(0.0) if bias is None else bias,
    )


def _token_norm(builder: Builder, x: Feature, norm: TokenNorm) -> Feature:
    """`fit.TokenNorm` of every token, channels last, in lanes of channels with one small layer.

    All layers are constants. Every row but those of mean and deviation holds one number, its
    negative and zeros, so that few bits round no weight: a hinge's factor multiplies what it
    rectifies, and its share of the deviation comes with the deviation.
    """
    channels = x.channels
    lane = max(d for d in range(1, builder.target.lanes + 1) if channels % d == 0)
    count, name = channels // lane, builder.last(x)
    positions = builder.graph.shapes[name][:-1]
    eye = torch.eye(lane, dtype=torch.float64)
    ones = torch.ones(lane, 1, dtype=torch.float64)

    def shared(rows: Tensor, source: str) -> str:
        """A few numbers of a token, beside every lane: (..., lanes, numbers)."""
        numbers = builder.fully_connected(source, rows, trainable=False)
        if count > 1:
            copies = torch.eye(len(rows), dtype=torch.float64).repeat(count, 1)
            numbers = builder.fully_connected(numbers, copies, trainable=False)
        return builder.emit("lanes", Reshape((*positions, count, len(rows))), numbers)

    def rectified(weight: Tensor, offset: Tensor, *sources: str) -> str:
        joined = sources[0]
        if len(sources) > 1:
            joined = builder.emit("concat", Concat(len(positions) + 2), *sources)
        total = builder.fully_connected(joined, weight, offset, trainable=False)
        return builder.emit("act", Activation(0.0, math.inf), total)

    lanes = builder.emit("lanes", Reshape((*positions, count, lane)), name)
    means = []
    if norm.centred:
        means = [shared(torch.full((1, channels), 1 / channels, dtype=torch.float64), name)]
    positive = torch.cat([eye, -ones], 1) if means else eye
    both = torch.cat([positive, -positive])
    sides = rectified(both, torch.zeros(2 * lane, dtype=torch.float64), lanes, *means)
    # Channel c of side i of lane n lies at (n, i, c) here, and at (i, n, c) in `deviation`.
    weights = norm.deviation.reshape(2, count, lane).transpose(0, 1).flatten()
    flat = builder.emit("flat", Reshape((*positions, 2 * channels)), sides)
    shares = sorted({v for v, _, _ in norm.hinges})
    deviation = shared(torch.tensor(shares, dtype=torch.float64)[:, None] * weights, flat)
    unit = abs(norm.slope) or 1.0
    reach, knots, factors = [], [], [norm.slope * eye, -norm.slope * eye] if norm.slope else []
    for v, t, a in norm.hinges:
        height = abs(a) / unit
        share = torch.eye(len(shares), dtype=torch.float64)[shares.index(v)].expand(lane, -1)
        reach += [height * torch.cat([side, share], 1) for side in (positive, -positive)]
        knots += [-height * t] * 2 * lane
        factors += [math.copysign(unit, a) * eye, math.copysign(unit, -a) * eye]
    bias = torch.tensor(knots, dtype=torch.float64)
    hinges = rectified(torch.cat(reach), bias, lanes, *means, deviation)
    if norm.slope:
        hinges = builder.emit("concat", Concat(len(positions) + 2), sides, hinges)
    total = builder.fully_connected(hinges, torch.cat(factors, 1), trainable=False)
    total = builder.emit("join", Reshape((*positions, channels)), total)
    return builder.from_last(x.shape, x.axis, total)


@rule("aten.group_norm.default", "aten.instance_norm.default")
def group_norm(site: Site) -> Value:
    """The same for groups of channels of one sample: nearly a batch norm, by least squares."""
    site.require_batch_ahead(site.batch.rank - 1)
    return scaled_to_fit(site, site.tagged("input", site.axis(1)))


@rule("aten.linalg_vector_norm.default", "aten.norm.ScalarOpt_dim")
def vector_norm(site: Site) -> Value:
    """|x|_p nearly a sum_i |x_i| + b, for every channel by least squares; the sum itself if p is 1.

    Global response norm (Woo et al. 2023, arXiv 2301.00808) is made of it.
    """
    order = site.node.arguments.get("ord", site.node.arguments.get("p"))
    if site.argument("dim") is None or order in (0, math.inf, -math.inf):
        raise site.error(
            "is over all axes, or counts or compares; only sums of powers have a rule: give axes, "
            "and another order"
        )
    total = summed(site, site.builder.build(absolute(site, site.feature("self"))))
    return total if order == 1 else scaled_to_fit(site, total)
