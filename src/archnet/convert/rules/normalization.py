"""Batch norm in eval mode (exact)."""

import torch

from archnet.convert.feature import Value
from archnet.convert.rules.base import Site, constant, rule


@rule("aten.batch_norm.default", "aten._native_batch_norm_legit_no_training.default")
def batch_norm(site: Site) -> Value:
    """Y = (x - mean) / sqrt(var + eps) * gamma + beta: a scale and a shift for every channel.

    Behind a convolution or linear layer they go into its weights; in front of a padded
    convolution they become a batch norm operator.
    """
    if site.argument("running_mean") is None or site.node.arguments.get("training"):
        raise site.error("batch norm without running statistics; call .eval() on the teacher")
    mean, variance = constant(site.argument("running_mean")), constant(site.argument("running_var"))
    scale = torch.rsqrt(variance + site.argument("eps"))
    if site.argument("weight") is not None:
        scale = scale * constant(site.argument("weight"))
    bias = -mean * scale
    if site.argument("bias") is not None:
        bias = bias + constant(site.argument("bias"))
    return site.form("input").affine(scale, bias)
