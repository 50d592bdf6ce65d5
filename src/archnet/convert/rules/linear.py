"""Linear layers (exact)."""

import torch

from archnet.convert.feature import Value
from archnet.convert.rules.base import Site, matrix_on, rule


@rule("aten.linear.default")
def linear(site: Site) -> Value:
    """y = W x + b on the last axis: the fully connected operator itself."""
    weight, bias = site.fixed("weight"), site.fixed("bias")
    assert weight is not None
    rows = torch.atleast_2d(weight)
    bias = torch.zeros(len(rows), dtype=torch.float64) if bias is None else bias.expand(len(rows))
    made = matrix_on(site, site.tagged("input", site.axis(-1)), rows, bias)
    if weight.dim() > 1:
        return made
    # A weight of one axis gives one number, without an axis of its own.
    return site.builder.reshape(site.builder.build(made), site.node.shape)
