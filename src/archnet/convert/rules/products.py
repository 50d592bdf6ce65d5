"""Matrix products of two features, such as linear attention's (approximate)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from archnet.convert.feature import Feature, Value
from archnet.convert.fit import mixing, product, relative_error
from archnet.convert.fuse import PRODUCT
from archnet.convert.rules.attention import mixed
from archnet.convert.rules.base import Alternative, Site, rule
from archnet.convert.rules.heads import heads_of, of_head
from archnet.convert.rules.hinged import Layers

_PRODUCTS = 2**17  # that hinges are fitted to
_LEAST = 0.01  # size of an axis that hardly moves, of the largest one


@rule(PRODUCT)
def matrix_product(site: Site) -> Value:
    """y = A B of two features, with hinges for the product of every pair (`fit.product`).

    For every head, with means a and b by inner axis, A B = (A - a)(B - b) + (A - a) b + a B. The
    last two are layers; the first is sum_c f(x_ic + y_cj) - f(x_ic) - f(y_cj), where x and y are
    what is left of A and B, brought to one size axis by axis. Linear attention is two of them
    (Katharopoulos et al. 2020, arXiv 2006.16236).

    Compact: B, mixed by a fixed matrix for every head; what A alone needs leaves the student.
    """
    second = site.value(list(site.node.arguments)[1])
    if site.is_compact or not site.builder.target.fc_per_position:
        return mixed(site, site.builder.build(second))
    factors = [site.builder.build(site.value(name)) for name in site.node.arguments]
    heads = heads_of(site, *factors)
    result = _Products(site, *factors).build()
    given, wanted = site.given(factors[1]), site.wanted()
    simpler = torch.empty_like(wanted)
    for head in range(heads):
        values, goal = of_head(given, head, heads), of_head(wanted, head, heads)
        of_head(simpler, head, heads).copy_(mixing(values, goal).to(values) @ values)
    name = list(site.node.arguments)[1]
    site.alternative = Alternative(
        (site.argument(name).name,),
        relative_error(simpler, wanted),
        relative_error(site.given(result), wanted),
    )
    return result


class _Products(Layers):
    """The layers of `matrix_product` for (..., n, k) and (..., k, m)."""

    def __init__(self, site: Site, first: Feature, second: Feature) -> None:
        super().__init__(site.builder)
        self.site = site
        *ahead, self.height, self.width = site.node.shape
        self.depth, self.groups = first.shape[-1], math.prod(ahead)
        ours = (self.groups, self.height, self.depth)
        theirs = (self.groups, self.depth, self.width)
        self.first = self.shaped(self._for_all(first, ahead), ours)
        self.second = self.turned(self.shaped(self._for_all(second, ahead), theirs), (0, 1, 3, 2))

    def build(self) -> Feature:
        groups, height, width, depth = self.groups, self.height, self.width, self.depth
        a, b = (self.site.given(self.tagged(name)) for name in (self.first, self.second))
        means = [x.double().mean((0, 2)) for x in (a, b)]
        sizes = [x.double().std((0, 2)) for x in (a, b)]
        sizes = [size.clamp_min(_LEAST * float(size.max()) + 1e-12) for size in sizes]
        common = (sizes[0] * sizes[1]).sqrt()
        scales = [common / size for size in sizes]
        x, y = (
            self._by_axis(name, scale, -scale * mean)
            for name, scale, mean in zip((self.first, self.second), scales, means, strict=True)
        )
        f = product(*self._sampled(x, y), self.site.approximation.attention_hinges)
        rows, columns = (groups, height, 1, depth), (groups, 1, width, depth)
        met = self.hinge_sum(f, self.shaped(x, rows), self.shaped(y, columns))
        ours, theirs = (
            self.added(line, self.shaped(self.hinge_sum(f, name, scale=-1.0), (groups, size, 1)))
            for line, name, size in (
                (self._line(x, means[1] / scales[0]), x, height),
                (self._line(self.second, means[0]), y, width),
            )
        )
        theirs = self.copied(self.turned(theirs, (0, 1, 3, 2)), 2, height)
        shape = self.site.node.shape
        result = self.shaped(self.added(met, self.copied(ours, 3, width), theirs), shape)
        return Feature(shape, first=result, axis=len(shape))

    def _for_all(self, feature: Feature, ahead: Sequence[int]) -> str:
        """A feature with the axes in front that the result has: keys of one head for all heads."""
        name = self.builder.first(feature)
        for axis, (have, want) in enumerate(zip(feature.shape, ahead, strict=False), 1):
            name = self.copied(name, axis, want // have)
        return name

    def _by_axis(self, name: str, scale: Tensor, shift: Tensor) -> str:
        """Scale * value + shift by group and inner axis, of (groups, tokens, depth)."""
        groups, tokens, depth = self.builder.graph.shapes[name]
        joined = self.shaped(self.turned(name, (0, 2, 1, 3)), (tokens, groups * depth))
        moved = self.builder.batchnorm(self.tagged(joined), scale.flatten(), shift.flatten())
        split = self.shaped(self.builder.first(moved), (tokens, groups, depth))
        return self.turned(split, (0, 2, 1, 3))

    def _line(self, name: str, slopes: Tensor) -> str:
        """Sum over the inner axis of slopes * value: (groups, tokens, 1)."""
        moved = self._by_axis(name, slopes, torch.zeros_like(slopes))
        return self.fixed(moved, torch.ones(1, self.depth, dtype=torch.float64))

    def _sampled(self, x: str, y: str) -> tuple[Tensor, Tensor]:
        """Some pairs of a row and a column of one group, with all their inner axes."""
        ours, theirs = (self.site.given(self.tagged(name)) for name in (x, y))
        pick = torch.Generator().manual_seed(0)
        count = math.ceil(_PRODUCTS / self.depth)
        sample, group, i, j = (
            torch.randint(size, (count,), generator=pick) for size in (*ours.shape[:3], self.width)
        )
        return ours[sample, group, i], theirs[sample, group, j]
