"""Batch norm in eval mode (exact); layer and group norm (approximate)."""

import torch

from archnet.convert.feature import Value
from archnet.convert.fit import regression, rows
from archnet.convert.rules.base import Site, as_form, constant, rule


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
    return as_form(site.tagged("input", site.axis(1))).affine(scale, bias)


@rule("aten.layer_norm.default")
def layer_norm(site: Site) -> Value:
    """Y = (x - E[x]) / sqrt(V[x]) * gamma + beta over a token, nearly a batch norm.

    Mean and deviation of every token give way to one scale and one shift for every channel
    (the paper's section on Transformers; PowerNorm, Shen et al. 2020, arXiv 2003.07845), here by
    least squares against the teacher's own result.
    """
    if len(site.argument("normalized_shape")) != 1:
        raise site.error("normalises over several axes; only the last one has a rule")
    return _fitted(site, site.tagged("input", len(site.node.shape)))


@rule("aten.group_norm.default", "aten.instance_norm.default")
def group_norm(site: Site) -> Value:
    """The same for groups of channels of one sample: nearly a batch norm, by least squares."""
    return _fitted(site, site.tagged("input", site.axis(1)))


def _fitted(site: Site, value: Value) -> Value:
    x, wanted = site.given(value), site.wanted()
    slopes, offset = regression([rows(x, value.axis)], rows(wanted, value.axis))
    return as_form(value).affine(slopes[:, 0], offset)
