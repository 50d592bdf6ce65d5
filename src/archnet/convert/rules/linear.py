"""Linear layers (exact)."""

import torch

from archnet.convert.feature import Convolution, Feature, Form, Value
from archnet.convert.rules.base import Site, constant, rule


@rule("aten.linear.default")
def linear(site: Site) -> Value:
    """Y = W x + b on the last axis: the fully connected operator itself."""
    weight = constant(site.argument("weight"))
    bias = torch.zeros(weight.shape[0], dtype=torch.float64)
    if site.argument("bias") is not None:
        bias = constant(site.argument("bias"))
    feature = site.feature("input")
    if feature.is_map:
        # A linear layer reads the last axis as it lies, whatever the axes mean.
        name = site.builder.fully_connected(site.builder.first(feature), weight, bias)
        return Feature(site.node.shape, first=name)
    term = Convolution(feature, weight[:, :, None, None], site.node.name)
    return Form(site.node.shape, [term], bias)
