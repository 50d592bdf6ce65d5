"""ReLU and clips (exact): the float case of an activation quantizer."""

import math

from archnet.convert.feature import Value
from archnet.convert.rules.base import Site, rule


@rule("aten.relu.default", "aten.relu_.default")
def relu(site: Site) -> Value:
    """Y = max(x, 0)."""
    return site.builder.activation(site.feature("self"), 0.0, math.inf)


@rule("aten.relu6.default", "aten.relu6_.default")
def relu6(site: Site) -> Value:
    """Y = min(max(x, 0), 6)."""
    return site.builder.activation(site.feature("self"), 0.0, 6.0)


@rule("aten.hardtanh.default", "aten.hardtanh_.default")
def hardtanh(site: Site) -> Value:
    """Y = min(max(x, low), high); torch traces ReLU6 to it with 0 and 6."""
    low, high = site.argument("min_val"), site.argument("max_val")
    return site.builder.activation(site.feature("self"), float(low), float(high))


@rule(
    "aten.clamp.default",
    "aten.clamp_.default",
    "aten.clamp_min.default",
    "aten.clamp_min_.default",
    "aten.clamp_max.default",
    "aten.clamp_max_.default",
)
def clip(site: Site) -> Value:
    """Y = min(max(x, low), high); an absent bound is infinite."""
    low, high = (site.node.arguments.get(bound) for bound in ("min", "max"))
    return site.builder.activation(
        site.feature("self"),
        -math.inf if low is None else float(low),
        math.inf if high is None else float(high),
    )


@rule("aten.dropout.default", "aten.dropout_.default", "aten.feature_dropout.default")
def dropout(site: Site) -> Value:
    """The identity in eval mode."""
    return site.value(site.subject)
