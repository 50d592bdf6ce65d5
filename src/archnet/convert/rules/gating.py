"""Products of two features, squeeze-and-excitation among them (approximate)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from archnet.convert.builder import Builder
from archnet.convert.feature import Carry, Feature, Form, Value
from archnet.convert.fit import Hinges, product, regression, relative_error, rows
from archnet.convert.rules.base import Alternative, Site, scaled_to_fit, stretched
from archnet.convert.rules.hinged import Layers
from archnet.ops import Multiply


def gate(site: Site) -> Value:
    """y = x s, nearly a x + b s + c for every channel, fitted by least squares.

    A product around its means is x s = E[s] x + E[x] s - E[x] E[s] + (x - E[x]) (s - E[s]). Where
    that pays, the last term is made of hinges of a sum (`fit.product`); where it does not, least
    squares puts as much of it into the others as they can take. Where ``s`` is one number a channel
    (squeeze-and-excitation, Hu et al. 2018, arXiv 1709.01507) it becomes a context path: `s` passes
    through whatever matrix follows at one position, and is spread over the map afterwards.

    Compact, of squeeze-and-excitation alone: a x + c; ``s``, and all that only it needs, leaves
    the student. A target that multiplies features keeps the product (exact).
    """
    if site.builder.keeps("mul"):
        builder = site.builder
        factors = [builder.build(site.value(name)) for name in ("self", "other")]
        if all(len(factor.shape) == len(site.node.shape) for factor in factors):
            axis = next((f.axis for f in factors if f.shape == site.node.shape), 0)
            name = builder.emit("product", Multiply(), *map(builder.first, factors))
            return Feature(site.node.shape, first=name, axis=axis)
    if site.is_compact:
        (name,) = site.approximation.compact[site.node.name]
        value = site.values[name]
        assert not isinstance(value, list)
        return scaled_to_fit(site, stretched(site, value))
    names = [site.argument("self").name, site.argument("other").name]
    x, s = site.value("self"), site.value("other")
    if x.shape != site.node.shape:
        x, s, names = s, x, names[::-1]
    shape = site.node.shape
    x = stretched(site, x)
    per_channel = (shape[0], 1, 1)
    if not (x.axis == 1 and len(shape) == 3 and s.shape == per_channel):
        s = stretched(site, s)
    s = site.builder.tagged(s, x.axis)
    features = [site.builder.build(x), site.builder.build(s)]
    wanted = site.wanted()
    inputs = [rows(site.given(f).expand_as(wanted), x.axis) for f in features]
    target = rows(wanted, x.axis)
    slopes, offset = regression(inputs, target)
    f = _hinges(site, inputs)
    if f is not None:
        features.append(_product(site.builder, features, f))
        inputs.append(rows(site.given(features[-1]), x.axis))
        slopes, offset = regression(inputs, target)
    if s.shape != shape:
        a, b = regression(inputs[:1], target)
        alone = relative_error(_line(a, b, inputs[:1]), target)
        faithful = relative_error(_line(slopes, offset, inputs), target)
        site.alternative = Alternative((names[0],), alone, faithful)
    terms = [Carry(f, slopes[:, i]) for i, f in enumerate(features)]
    return Form(shape, [*terms], offset, axis=x.axis)


_SMALL = 0.02  # an error that is not worth a hinge
_WORTH = 0.85
_PAIRS = 2**17  # that hinges are fitted to


def _line(slopes: Tensor, offset: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """sum_i a_i x_i + b for every channel, (C, M)."""
    total = offset[:, None].expand_as(inputs[0]).clone()
    for slope, item in zip(slopes.T, inputs, strict=True):
        total += slope[:, None] * item
    return total


@dataclass(frozen=True)
class _Scaled:
    """Hinges for two features, each scaled to mean 0 and deviation 1 by channel."""

    means: Sequence[Tensor]
    sizes: Sequence[Tensor]
    hinges: Hinges


def _hinges(site: Site, inputs: Sequence[Tensor]) -> _Scaled | None:
    """Hinges for the product of two features (C, M), if they are worth their cost.

    What counts is the product of what is given: beside the teacher's, errors of what stands before
    would hide what the product loses.
    """
    count = site.approximation.gate_hinges
    if not count or not site.builder.target.fc_per_position:
        return None
    wanted = inputs[0] * inputs[1]
    slopes, offset = regression(inputs, wanted)
    error = relative_error(_line(slopes, offset, inputs), wanted)
    if error < _SMALL:
        return None
    x, s = (item.double() for item in inputs)
    sizes = [item.std(1) for item in (x, s)]
    # A channel that hardly moves is not blown up.
    least = [0.01 * float(size.max()) + 1e-12 for size in sizes]
    sizes = [size.clamp_min(few) for size, few in zip(sizes, least, strict=True)]
    means = [item.mean(1) for item in (x, s)]
    x, s = (
        (item - mean[:, None]) / size[:, None]
        for item, mean, size in zip((x, s), means, sizes, strict=True)
    )
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(x.numel(), (min(x.numel(), _PAIRS),), generator=generator)
    f = product(x.flatten()[places, None], s.flatten()[places, None], count)
    met = f(x + s) - f(x) - f(s)
    slopes, offset = regression([*inputs, met], wanted)
    nearer = relative_error(_line(slopes, offset, [*inputs, met]), wanted)
    return _Scaled(means, sizes, f) if nearer < _WORTH * error else None


def _product(builder: Builder, features: Sequence[Feature], f: _Scaled) -> Feature:
    """f(x + s) - f(x) - f(s) of two features."""
    layers, hinges = Layers(builder), f.hinges
    x, s = (
        builder.batchnorm(feature, 1 / size, -mean / size)
        for feature, mean, size in zip(features, f.means, f.sizes, strict=True)
    )
    flat = (math.prod(x.shape[: x.axis - 1]), x.channels, math.prod(x.shape[x.axis :]), 1)
    ours = layers.shaped(builder.first(x), flat)
    theirs = layers.shaped(builder.first(s), (*flat[:2], math.prod(s.shape[s.axis :]), 1))
    met = layers.hinge_sum(hinges, ours, theirs)
    alone = [layers.hinge_sum(hinges, name, scale=-1.0) for name in (ours, theirs)]
    if s.shape != x.shape:
        alone[1] = layers.copied(alone[1], 3, flat[2])
    total = layers.added(met, *alone)
    return Feature(x.shape, first=layers.shaped(total, x.shape), axis=x.axis)
