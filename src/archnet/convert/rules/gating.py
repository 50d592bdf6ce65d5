"""Products of two features, squeeze-and-excitation among them (approximate)."""

from archnet.convert.feature import Carry, Form, Value
from archnet.convert.fit import regression, relative_error, rows
from archnet.convert.rules.base import Alternative, Site, scaled_to_fit


def gate(site: Site) -> Value:
    """Y = x s, nearly a x + b s + c for every channel, fitted by least squares.

    A product around its means is x s = E[s] x + E[x] s - E[x] E[s] + (x - E[x]) (s - E[s]); what
    is dropped is the last term, and least squares puts as much of it into the others as they can
    take. Where ``s`` is one number a channel (squeeze-and-excitation, Hu et al. 2018, arXiv
    1709.01507) it becomes a context path: `s` passes through whatever matrix follows at one
    position, and is spread over the map afterwards.

    Compact, of squeeze-and-excitation alone: a x + c; ``s``, and all that only it needs, leaves
    the student.
    """
    if site.is_compact:
        (name,) = site.approximation.compact[site.node.name]
        value = site.values[name]
        assert not isinstance(value, list)
        return scaled_to_fit(site, value)
    names = [site.argument("self").name, site.argument("other").name]
    x, s = site.value("self"), site.value("other")
    if x.shape != site.node.shape:
        x, s, names = s, x, names[::-1]
    shape = site.node.shape
    if x.shape != shape or len(s.shape) != len(shape):
        raise site.error(f"multiplies shapes {x.shape} and {s.shape}; this has no rule")
    s = site.builder.tagged(s, x.axis)
    per_channel = [n if axis == x.axis else 1 for axis, n in enumerate(shape, 1)]
    if list(s.shape) not in (list(shape), per_channel):
        raise site.error(f"multiplies shapes {x.shape} and {s.shape}; this has no rule")
    if s.shape != shape and not (len(shape) == 3 and x.axis == 1):
        raise site.error("gates the channels of something that is no map; this has no rule")
    features = [site.builder.build(x), site.builder.build(s)]
    wanted = site.wanted()
    inputs = [rows(site.given(f).expand_as(wanted), x.axis) for f in features]
    target = rows(wanted, x.axis)
    slopes, offset = regression(inputs, target)
    if s.shape != shape:
        faithful = sum(a[:, None] * v for a, v in zip(slopes.T, inputs, strict=True))
        a, b = regression(inputs[:1], target)
        site.alternative = Alternative(
            (names[0],),
            relative_error(a * inputs[0] + b[:, None], target),
            relative_error(faithful + offset[:, None], target),
        )
    terms = [Carry(f, slopes[:, i]) for i, f in enumerate(features)]
    return Form(shape, [*terms], offset, axis=x.axis)
