"""ReLU and clips (exact): the float case of an activation quantizer; smooth ones (approximate)."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from archnet.capture import Ref, stem
from archnet.convert.builder import Builder
from archnet.convert.feature import Carry, Feature, Form, Value
from archnet.convert.fit import Hinges, clipped_line, curve, regression, relative_error, rows
from archnet.convert.rules.base import (
    Alternative,
    Site,
    affine,
    as_form,
    constant,
    joined,
    number,
    rule,
    scaled_to_fit,
    stretched,
)
from archnet.ops import Multiply
from archnet.ops.native import FUNCTIONS


@rule("aten.relu.default")
def relu(site: Site) -> Value:
    """y = max(x, 0)."""
    return site.builder.activation(site.feature("self"), 0.0, math.inf)


@rule("aten.relu6.default")
def relu6(site: Site) -> Value:
    """y = min(max(x, 0), 6)."""
    return site.builder.activation(site.feature("self"), 0.0, 6.0)


@rule("aten.hardtanh.default")
def hardtanh(site: Site) -> Value:
    """y = min(max(x, low), high); torch traces ReLU6 to it with 0 and 6."""
    low, high = site.argument("min_val"), site.argument("max_val")
    return site.builder.activation(site.feature("self"), float(low), float(high))


@rule(
    "aten.clamp.default",
    "aten.clamp_min.default",
    "aten.clamp_max.default",
    "aten.clamp.Tensor",
    "aten.clamp_min.Tensor",
    "aten.clamp_max.Tensor",
)
def clip(site: Site) -> Value:
    """y = min(max(x, low), high); an absent bound is infinite, a tensor has one for each entry."""
    low, high = (site.node.arguments.get(bound) for bound in ("min", "max"))
    if any(isinstance(bound, Tensor | Ref) for bound in (low, high)):
        value = site.value("self")
        for bound, sign in ((low, 1.0), (high, -1.0)):
            if bound is not None:
                value = _extreme(site, value, bound, sign)
        return value
    return site.builder.activation(
        site.feature("self"),
        -math.inf if low is None else float(low),
        math.inf if high is None else float(high),
    )


@rule("aten.hardsigmoid.default")
def hardsigmoid(site: Site) -> Value:
    """y = min(max(x / 6 + 1/2, 0), 1): a scale and a shift that fold, and a clip."""
    line = site.form("self").affine(torch.tensor([1 / 6]).double(), torch.tensor([0.5]).double())
    return site.builder.activation(site.builder.build(line), 0.0, 1.0)


@rule("aten.threshold.default")
def threshold(site: Site) -> Value:
    """y = x where x > t, else v. This is a clip if v = t; otherwise it is not continuous."""
    low, value = float(site.argument("threshold")), float(site.argument("value"))
    if low != value:
        raise site.error(
            f"jumps from {value} to {low}, and only a clip has a rule: set both to {low}"
        )
    return site.builder.activation(site.feature("self"), low, math.inf)


@rule(
    "aten.leaky_relu.default",
    "aten.rrelu.default",
)
def leaky_relu(site: Site) -> Value:
    """y = a x + (1 - a) max(x, 0): a ReLU and its own input, added.

    Of a randomised one (RReLU) the slope is the mean of its two, as in eval mode.
    """
    x = site.feature("self")
    if "rrelu" in site.node.operator:
        slope = (float(site.argument("lower")) + float(site.argument("upper"))) / 2
    else:
        slope = float(site.argument("negative_slope"))
    rectified = site.builder.activation(x, 0.0, math.inf)
    scales = [torch.full((x.channels,), s, dtype=torch.float64) for s in (slope, 1 - slope)]
    terms = [Carry(feature, scale) for feature, scale in zip((x, rectified), scales, strict=True)]
    return Form(x.shape, [*terms], axis=x.axis)


@rule("aten.prelu.default", "aten._prelu_kernel.default")
def prelu(site: Site) -> Value:
    """The same with a slope of its own for every channel."""
    x = site.builder.build(site.tagged("self", site.axis(1)))
    slopes = site.fixed("weight")
    assert slopes is not None
    slopes = slopes.flatten().expand(x.channels)
    rectified = site.builder.activation(x, 0.0, math.inf)
    return Form(x.shape, [Carry(x, slopes), Carry(rectified, 1 - slopes)], axis=x.axis)


@rule("aten.abs.default")
def magnitude(site: Site) -> Value:
    """|x| = 2 max(x, 0) - x."""
    return absolute(site, site.feature("self"))


def absolute(site: Site, x: Feature) -> Form:
    """The form |x|."""
    rectified = site.builder.activation(x, 0.0, math.inf)
    ones = torch.ones(x.channels, dtype=torch.float64)
    return Form(x.shape, [Carry(x, -ones), Carry(rectified, 2 * ones)], axis=x.axis)


@rule("aten.softshrink.default")
def softshrink(site: Site) -> Value:
    """y = max(x - t, 0) - max(-x - t, 0)."""
    form, t = site.form("self"), float(site.argument("lambd"))
    shift = torch.tensor([-t]).double()
    sides = [
        site.builder.activation(
            site.builder.build(form.affine(torch.tensor([sign]).double(), shift)), 0.0, math.inf
        )
        for sign in (1.0, -1.0)
    ]
    ones = torch.ones(sides[0].channels, dtype=torch.float64)
    terms = [Carry(side, sign * ones) for side, sign in zip(sides, (1.0, -1.0), strict=True)]
    return Form(form.shape, [*terms], axis=form.axis)


@rule("aten.maximum.default", "aten.minimum.default", "aten.max.other", "aten.min.other")
def extremum(site: Site) -> Value:
    """The larger, or the smaller, of two values."""
    sign = 1.0 if "max" in site.node.operator else -1.0
    first, second = site.argument("self"), site.argument("other")
    if not isinstance(first, Ref):
        first, second = second, first
    return _extreme(site, site.referred(first), second, sign)


def _extreme(site: Site, value: Value, bound: Any, sign: float) -> Value:
    """max(a, b) = b + max(a - b, 0); min(a, b) = b - max(b - a, 0); b may be a constant."""
    if not isinstance(bound, Ref):
        other = constant(torch.as_tensor(bound))
        gap = affine(site, value, number(sign), -sign * other)
        above = site.builder.activation(site.builder.build(gap), 0.0, math.inf)
        return affine(site, above, number(sign), other)
    a, b = (site.builder.build(stretched(site, item)) for item in (value, site.referred(bound)))
    b = site.builder.build(site.builder.tagged(b, a.axis))
    ones = torch.ones(a.channels, dtype=torch.float64)
    form = Form(a.shape, [Carry(a, sign * ones), Carry(b, -sign * ones)], axis=a.axis)
    rectified = site.builder.activation(site.builder.build(form), 0.0, math.inf)
    return Form(a.shape, [Carry(b), Carry(rectified, sign * ones)], axis=a.axis)


@dataclass(frozen=True)
class Curve:
    """A smooth function that one clipped line min(max(a x + b, low), high) stands for.

    ``slopes`` and ``offsets`` are (first, last) candidates for a and b.
    """

    low: float
    high: float
    slopes: tuple[float, float]
    offsets: tuple[float, float]


_CURVES = {
    "gelu": Curve(0.0, math.inf, (0.5, 1.1), (-0.5, 0.4)),
    "silu": Curve(0.0, math.inf, (0.4, 1.1), (-0.9, 0.4)),
    "hardswish": Curve(0.0, math.inf, (0.4, 1.1), (-0.9, 0.4)),
    "mish": Curve(0.0, math.inf, (0.5, 1.1), (-0.7, 0.5)),
    "softplus": Curve(0.0, math.inf, (0.3, 1.1), (-0.3, 0.8)),
    "elu": Curve(-1.0, math.inf, (0.5, 1.1), (-0.4, 0.4)),
    "celu": Curve(-1.0, math.inf, (0.5, 1.1), (-0.4, 0.4)),
    "selu": Curve(-1.7581, math.inf, (0.6, 1.2), (-0.6, 0.4)),
    "log_sigmoid": Curve(-math.inf, 0.0, (0.3, 1.1), (-0.8, 0.3)),
    "sigmoid": Curve(0.0, 1.0, (0.1, 0.3), (0.3, 0.7)),
    "tanh": Curve(-1.0, 1.0, (0.4, 1.1), (-0.3, 0.3)),
    "erf": Curve(-1.0, 1.0, (0.5, 1.3), (-0.3, 0.3)),
}
_CANDIDATES = 9  # of each number
_WORTH = 0.85
_FLAT = 1e-3  # of the steepest slope: a segment that adds nothing


@rule(
    *(f"aten.{name}{mark}.default" for name in _CURVES for mark in ("", "_")),
)
def smooth_activation(site: Site) -> Value:
    """A GELU, SiLU, hardswish, sigmoid, tanh or the like, in a compact or a faithful form.

    Compact: Y nearly min(max(a x + b, low), high), the best a and b for every channel. The line
    goes into the layer in front, so that it costs what a ReLU costs.

    Faithful: Y nearly sum_j a_j max(x - t_j, 0) + c, in segments (`fit.curve`). A teacher whose
    values stay near zero, where these functions are nearly a line, needs it; it is taken where it
    leaves less than `_WORTH` of the compact form's error, and a budget does not forbid it.

    A target that has an operator for it keeps it (exact).
    """
    kept = _kept(site)
    if kept is not None:
        return kept
    shape = _CURVES[stem(site.node.operator)]
    shape = replace(shape, low=shape.low * float(site.node.arguments.get("alpha", 1.0)))
    return _curved(site, site.form(site.subject), site.wanted(), shape)


def _kept(site: Site) -> Value | None:
    """The function as the target's own operator; a SiLU as x sigmoid(x). None where it has none."""
    kind, given = stem(site.node.operator), site.node.arguments
    if given.get("approximate", "none") != "none" or any(
        float(given.get(name, 1.0)) != 1.0 for name in ("alpha", "beta", "scale", "input_scale")
    ):
        return None
    builder = site.builder
    if kind == "silu" and builder.keeps("sigmoid", "mul"):
        x = site.feature(site.subject)
        gate = builder.function(x, "sigmoid")
        assert gate is not None
        name = builder.emit("product", Multiply(), builder.first(x), builder.first(gate))
        return Feature(x.shape, first=name, axis=x.axis)
    if kind not in FUNCTIONS or not (builder.keeps(kind) or kind == "gelu"):
        return None
    return builder.function(site.feature(site.subject), kind)


@rule(
    "aten.softmax.int",
    "aten._softmax.default",
    "aten.log_softmax.int",
    "aten._log_softmax.default",
)
def probabilities(site: Site) -> Value:
    """Weights of two, as between two branches: s and 1 - s, with s the sigmoid of their gap.

    Class scores are compared, exported and run as they are, and so have none; nor have weights of
    more than two, outside attention.
    """
    axis, feature = site.axis(site.argument("dim")), site.feature(site.subject)
    if len(feature.shape) == 1:
        raise site.error(
            "computes probabilities, which five operators cannot: let the teacher return its class "
            "scores (for example teacher.softmax = nn.Identity()), of which the largest is the same"
        )
    if feature.shape[axis - 1] != 2 or "log" in site.node.operator:
        raise site.error(
            "is a softmax of more than two values, or its logarithm, outside attention; only two "
            "values have a rule: use a sigmoid, or end the network before it"
        )
    a, b = (site.builder.slice(feature, axis, index, index + 1) for index in range(2))
    ones = torch.ones(a.channels, dtype=torch.float64)
    gap = Form(a.shape, [Carry(a), Carry(b, -ones)], axis=a.axis)
    ours = _curved(site, gap, site.wanted().narrow(axis, 0, 1), _CURVES["sigmoid"])
    theirs = as_form(ours).affine(-ones, ones)
    return joined(site, [site.builder.build(value) for value in (ours, theirs)], axis)


def _curved(site: Site, form: Form, target: Tensor, shape: Curve) -> Value:
    """A smooth function of a form, as `smooth_activation` says; (B, *shape) is what it gives."""
    given = site.given(form)
    x, wanted = rows(given, form.axis), rows(target, form.axis)
    slope, offset = clipped_line(
        x,
        wanted,
        shape.low,
        shape.high,
        torch.linspace(*shape.slopes, _CANDIDATES).tolist(),
        torch.linspace(*shape.offsets, _CANDIDATES).tolist(),
    )
    count = site.approximation.hinges
    if count and not site.is_compact:
        hinges = curve(x.flatten(), wanted.flatten(), count, offset=True)
        compact = (slope[:, None].to(x) * x).add_(offset[:, None]).clamp_(shape.low, shape.high)
        faithful = hinges(x)
        errors = relative_error(compact, wanted), relative_error(faithful, wanted)
        if errors[1] < _WORTH * errors[0]:
            site.alternative = Alternative(tuple(site.node.refs()), *errors)
            result = _piecewise(site.builder, site.builder.build(form), hinges)
            moved = given.movedim(form.axis, 0)
            site.hold(result, faithful.reshape(moved.shape).movedim(0, form.axis))
            return result
    line = site.builder.build(form.affine(slope, offset))
    return site.builder.activation(line, shape.low, shape.high)


_POINTWISE = ("square", "sqrt", "rsqrt", "exp", "expm1", "log", "log1p", "reciprocal", "sin", "cos")


@rule("aten.pow.Tensor_Scalar", *(f"aten.{name}.default" for name in _POINTWISE))
def pointwise(site: Site) -> Value:
    """Any other function of single numbers: hinges, or a line for every channel as compact form.

    Both are right where calibration inputs lead, and as far off as they like elsewhere.
    """
    kept = _kept(site)
    if kept is not None:
        return kept
    count, form = site.approximation.hinges, site.form(site.subject)
    if count and not site.is_compact:
        x, wanted = (rows(y, form.axis) for y in (site.given(form), site.wanted()))
        hinges = curve(x.flatten(), wanted.flatten(), count, offset=True)
        slopes, offset = regression([x], wanted)
        compact = relative_error(slopes * x + offset[:, None], wanted)
        faithful = relative_error(hinges(x), wanted)
        if faithful < _WORTH * compact:
            site.alternative = Alternative(tuple(site.node.refs()), compact, faithful)
            return _piecewise(site.builder, site.builder.build(form), hinges)
    return scaled_to_fit(site, form)


def _piecewise(builder: Builder, x: Feature, hinges: Hinges) -> Feature:
    """The same function as a sum of ramps, c + sum_j +-min(max(s_j (x - t_j), 0), h_j).

    Hinges have ranges and weights that nearly cancel, and their rounding does not. A ramp is one
    segment: s_j is its slope (the sum of the weights so far), h_j = s_j (t_{j+1} - t_j) what it
    adds. The layer which adds the ramps has ones in it, exact at any width, and the grid that they
    share is as fine as one of the sum.
    """
    knots, order = hinges.knots.sort()
    starts, slopes = knots.tolist(), hinges.weights[order].cumsum(0).tolist()
    lines, signs = [], []
    for start, end, slope in zip(starts, [*starts[1:], math.inf], slopes, strict=True):
        if abs(slope) < _FLAT * max(map(abs, slopes)):
            continue
        lines.append((abs(slope), -abs(slope) * start, abs(slope) * (end - start)))
        signs.append(math.copysign(1.0, slope))
    return builder.segments(x, lines, signs, hinges.offset)


@rule(
    "aten.dropout.default",
    "aten.feature_dropout.default",
    "aten.alpha_dropout.default",
    "aten.feature_alpha_dropout.default",
)
def dropout(site: Site) -> Value:
    """The identity in eval mode."""
    if site.argument("train") and site.argument("p"):
        raise site.error(
            "draws random numbers in eval mode too: pass training=self.training, or use nn.Dropout"
        )
    return site.value(site.subject)
