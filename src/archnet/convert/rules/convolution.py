"""Convolutions of any kernel, stride, dilation and grouping (exact)."""

import torch

from archnet.convert.feature import Convolution, Form, Value
from archnet.convert.rules.base import Site, constant, matrix_on, rule


@rule("aten.conv2d.default", "aten.conv2d.padding")
def convolution(site: Site) -> Value:
    """Y = W * x + b, read as a linear form; `Builder.convolve` builds it in the cheapest way.

    A per-channel scale and shift in front of an unpadded 1x1 convolution goes into its weights.
    In front of any other convolution it stays, because zero padding comes after it.
    """
    weight = constant(site.argument("weight"))
    stride, dilation = site.pair("stride"), site.pair("dilation")
    padding = _padding(site, weight.shape[2], weight.shape[3], dilation)
    groups = site.argument("groups")
    bias = torch.zeros(weight.shape[0], dtype=torch.float64)
    if site.argument("bias") is not None:
        bias = constant(site.argument("bias"))
    value = site.tagged("input", 1)
    if len(value.shape) != 3:
        raise site.error("convolves images that are joined with the batch")
    if weight.shape[2:] == (1, 1) and padding == (0, 0) and groups == 1 and stride == (1, 1):
        return matrix_on(site, value, weight[:, :, 0, 0], bias)
    feature = site.builder.build(value)
    if weight.shape[2:] == (1, 1) and padding == (0, 0):
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
