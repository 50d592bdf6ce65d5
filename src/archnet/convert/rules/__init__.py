"""One rewrite rule per teacher construct; importing this package registers them all.

To support a new operator, write a function with `@rule("aten.<operator>.<overload>")` in the file
of its kind (or a new file, listed here) and a test of equality. Nothing else changes.
"""

from archnet.convert.rules import (
    activation,
    attention,
    convolution,
    gating,
    layout,
    linear,
    normalization,
    pooling,
    products,
    residual,
    writes,
)
from archnet.convert.rules.base import RULES, Rule, rule

__all__ = [
    "RULES",
    "Rule",
    "activation",
    "attention",
    "convolution",
    "gating",
    "layout",
    "linear",
    "normalization",
    "pooling",
    "products",
    "residual",
    "rule",
    "writes",
]
