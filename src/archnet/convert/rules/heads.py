"""Features of attention by head, and layers that every head has of its own."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from archnet.convert.builder import Builder
from archnet.convert.feature import Convolution, Feature
from archnet.convert.fit import Layer
from archnet.convert.rules.base import Site, joined
from archnet.ops import Permute, Reshape


def heads_of(site: Site, *features: Feature) -> int:
    """How many heads the result has; keys and values may have fewer, each for several heads."""
    shape = site.node.shape
    heads = shape[-3] if len(shape) > 2 else 1
    for feature in features:
        theirs = feature.shape[-3] if len(shape) > 2 and len(feature.shape) > 2 else 1
        if len(shape) < 2 or feature.shape[:-3] != shape[:-3] or heads % theirs:
            raise site.error(
                f"combines features of shape {feature.shape} to {shape}; axes before the heads "
                "must be equal: expand them"
            )
    return heads


def of_head(x: Tensor, head: int, heads: int) -> Tensor:
    """A view of what head number ``head`` has of (samples, ..., heads, tokens, channels)."""
    return x.select(-3, head * x.shape[-3] // heads) if x.dim() > 3 else x


def by_head(site: Site, feature: Feature) -> Feature:
    """(..., heads, tokens, channels) as (heads, tokens, windows, channels)."""
    builder = site.builder
    heads, tokens, width = (1, *feature.shape)[-3:]
    windows = math.prod(feature.shape[:-3])
    found = builder.layout(feature, "heads", Reshape((windows, heads, tokens, width)), 4)
    return turned(builder, found, (0, 2, 3, 1, 4), 4)


def repeated(site: Site, feature: Feature, heads: int) -> Feature:
    """The same, once for each of the heads that share it."""
    theirs, *others = feature.shape
    if theirs == heads:
        return feature
    copied = joined(site, [feature] * (heads // theirs), 2)
    return site.builder.layout(copied, "heads", Reshape((heads, *others)), feature.axis)


def in_order(site: Site, feature: Feature, order: tuple[int, ...]) -> Feature:
    """A permutation to (windows, heads, tokens, channels), in the shape of the node's result."""
    shape = site.node.shape
    ordered = turned(site.builder, feature, order, 4)
    return site.builder.layout(ordered, "shape", Reshape(shape), len(shape))


def turned(builder: Builder, feature: Feature, order: tuple[int, ...], axis: int) -> Feature:
    """Axes in another order; ``axis`` is that of the result along which it is concatenated."""
    return builder.layout(feature, "order", Permute(order), axis)


def layers(
    builder: Builder, feature: Feature, given: Sequence[Layer], *, rectified: bool = False
) -> Feature:
    """A layer (O, I) for every head, on the second axis of (heads, I, height, width): a convolution
    whose groups are the heads. Heads of the feature that several of the result share are one group.
    """
    groups, depth, *size = feature.shape
    weight, bias = (torch.cat(numbers) for numbers in zip(*given, strict=True))
    flat = builder.layout(feature, "map", Reshape((groups * depth, *size)), 1)
    layer = Convolution(flat, weight[:, :, None, None], builder.owner, groups=groups)
    done = builder.convolve(layer, bias)
    if rectified:
        done = builder.activation(done, 0.0, math.inf)
    shape = (len(given), len(weight) // len(given), *size)
    return builder.layout(done, "layers", Reshape(shape), feature.axis)


def unshifted(matrices: Sequence[Tensor]) -> list[Layer]:
    """Layers without a bias, yet."""
    return [(matrix, torch.zeros(len(matrix), dtype=torch.float64)) for matrix in matrices]
