"""Linear layers (exact)."""

import torch

from archnet.convert.feature import Value
from archnet.convert.rules.base import Site, constant, matrix_on, rule


@rule("aten.linear.default")
def linear(site: Site) -> Value:
    """Y = W x + b on the last axis: the fully connected operator itself."""
    weight = constant(site.argument("weight"))
    bias = torch.zeros(weight.shape[0], dtype=torch.float64)
    if site.argument("bias") is not None:
        bias = constant(site.argument("bias"))
    return matrix_on(site, site.tagged("input", len(site.node.shape)), weight, bias)
