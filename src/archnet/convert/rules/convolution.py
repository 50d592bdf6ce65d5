"""Convolutions of any kernel, stride, dilation and grouping (exact)."""

import torch

from archnet.convert.feature import Carry, Convolution, Form, Value
from archnet.convert.rules.base import Site, constant, rule


@rule("aten.conv2d.default", "aten.conv2d.padding")
def convolution(site: Site) -> Value:
    """Y = W * x + b, read as a linear form; `Builder.convolve` builds it in the cheapest way.

    A per-channel scale and shift in front of an unpadded 1x1 convolution (a batch norm without
    an activation) goes into its weights: W (s x + t) + b = (W s) x + (W t + b). In front of any
    other convolution it stays, because zero padding comes after it.
    """
    weight = constant(site.argument("weight"))
    stride, dilation = site.pair("stride"), site.pair("dilation")
    padding = _padding(site, weight.shape[2], weight.shape[3], dilation)
    groups = site.argument("groups")
    bias = torch.zeros(weight.shape[0], dtype=torch.float64)
    if site.argument("bias") is not None:
        bias = constant(site.argument("bias"))
    value = site.value("input")
    pointwise = weight.shape[2:] == (1, 1) and padding == (0, 0) and groups == 1
    if pointwise and isinstance(value, Form) and len(value.terms) == 1:
        (term,) = value.terms
        if isinstance(term, Carry):
            bias = bias + weight[:, :, 0, 0] @ value.bias.expand(weight.shape[1])
            if term.scale is not None:
                weight = weight * term.scale[None, :, None, None]
            value = term.feature
    feature = site.builder.build(value)
    if weight.shape[2:] == (1, 1) and padding == (0, 0) and stride != (1, 1):
        # Dropping pixels is a layout move; what remains is a matrix that sums can merge with.
        feature, stride = site.builder.windows(feature, (1, 1), stride)[0], (1, 1)
    term = Convolution(feature, weight, site.node.name, stride, padding, dilation, groups)
    return Form(site.node.shape, [term], bias)


def _padding(site: Site, kh: int, kw: int, dilation: tuple[int, int]) -> tuple[int, int]:
    padding = site.argument("padding")
    if padding == "valid":
        return (0, 0)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, (kh, kw), strict=True)]
        if any(n % 2 for n in total):
            raise site.error("padding='same' of an even kernel pads unevenly; use nn.ZeroPad2d")
        return (total[0] // 2, total[1] // 2)
    return site.pair("padding")
