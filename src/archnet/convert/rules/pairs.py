"""Attention for every pair of tokens: scores, softmax and weighted sum as sums of hinges."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from archnet.convert.feature import Feature
from archnet.convert.fit import balanced, curve, mixing, product, ridge, rows
from archnet.convert.rules.base import Site
from archnet.convert.rules.heads import by_head, layers, turned, unshifted
from archnet.convert.rules.hinged import Layers
from archnet.ops import MaxPool

_SCORE_ERROR = 0.1  # deviation that axes left out may add to a score
_VALUE_ERROR = 0.1  # share of the values' energy that axes left out may have
_PRODUCTS = 2**20  # that hinges are fitted to
_EXPONENTIAL, _LOGARITHM = 5, 3  # hinges of each
_CENTRE = 0.7  # weights over values, in a pair: weights have the longer tail


class Pairs(Layers):
    """softmax(Q K' / sqrt(d) + mask) V, its products made by hinges of sums (`fit.product`).

    For every head, query i and key j, all of it constants of the conversion:

    - t_ij = sum_c (f(a_ic + b_jc) - f(b_jc)) + k_j . mean(q) + mask_ij: a and b are queries and
      keys, less their means, in the axes where their products are largest first
      (`fit.balanced`). What moves all scores of a query alike a softmax does not see.
    - p_ij = g(t_ij - m_i - l(mean_j e(t_ij - m_i))): m is the largest score, by max-pooling; e
      and g are hinges near exp, l is near log.
    - z_ic = sum_j (h(p_ij + y_jc) - h(p_ij) - h(y_jc)): y are values, less their mean, in the axes
      of most energy; p is less its mean. The result is R z + A V: fixed weights A over tokens
      give what is left.

    A row of the layers that read pairs holds one number and its negative, so that few bits round
    none of them; what they add are ones.

    Args:
        site: of the attention.
        features: queries, keys and values, (..., heads, tokens, channels).
        heads: of the result; keys and values may have fewer, each for several.
        mask: (windows or 1, heads, queries, keys), or None.
        scales: of the scores of each head.
    """

    def __init__(
        self,
        site: Site,
        features: Sequence[Feature],
        heads: int,
        mask: Tensor | None,
        scales: Sequence[float],
    ) -> None:
        super().__init__(site.builder)
        self.site, self.heads = site, heads
        self.count, self.scales, self.mask = site.approximation.attention_hinges, scales, mask
        self.query, self.key, self.value = features
        shape = site.node.shape
        self.windows = math.prod(shape[:-3])
        self.asking, self.tokens = shape[-2], self.key.shape[-2]
        self.queries = self.windows * self.asking  # of all windows
        self.pick = torch.Generator().manual_seed(0)

    def build(self) -> Feature:
        """The attention; ``simpler`` is then what fixed weights alone give of the values."""
        scores = self._scores()
        weighed, means = self._weighted(scores)
        shape = self.site.node.shape
        result = self.builder.add([weighed, means])
        split = self.shaped(
            self.builder.first(result), (self.windows, self.asking, self.heads, shape[-1])
        )
        by_heads = self.turned(split, (0, 1, 3, 2, 4))
        return Feature(shape, first=self.shaped(by_heads, shape), axis=len(shape))

    # -- parts ---------------------------------------------------------------------------------

    def _scores(self) -> str:
        """Scores t (queries of all windows, heads, keys)."""
        query, key = self._given(self.query), self._given(self.key)
        axes, centres, kept = [], [], 1
        for head, scale in enumerate(self.scales):
            asked, offered = (rows(self._of(x, head), -1) for x in (query, key))
            asked = asked * scale
            centre = [x.mean(1, keepdim=True).double() for x in (asked, offered)]
            a, b, sizes = balanced(asked - centre[0], offered - centre[1])
            left = sizes.square().flip(0).cumsum(0).sqrt()
            kept = max(kept, len(sizes) - int((left <= _SCORE_ERROR).sum()))
            axes.append((scale * a, b))
            centres.append((centre[0] / scale, centre[1], centre[0]))
        ours = self._in_axes(self.query, [a[:kept] for a, _ in axes], [c[0] for c in centres])
        theirs = self._in_axes(self.key, [b[:kept] for _, b in axes], [c[1] for c in centres])
        a, b = (self._split(self.site.given(self.tagged(x))) for x in (ours, theirs))
        f = product(*self._sampled(a, b, kept), self.count)
        each = (self.heads, kept)
        met = self.hinge_sum(
            f,
            self.shaped(ours, (self.windows, self.asking, 1, *each)),
            self.shaped(theirs, (self.windows, 1, self.tokens, *each)),
        )
        keys = (self.windows, self.tokens, *each)
        alone = self.hinge_sum(f, self.shaped(theirs, keys), scale=-1.0)
        # The mean query asks all keys the same.
        matrix = self._block([c[2].T for c in centres], self.key)
        common = self.fixed(self._flat(self.key), matrix)
        offset = self.turned(self.added(common, alone), (0, 1, 3, 2))
        offset = self.shaped(offset, (self.windows, 1, self.heads * self.tokens))
        offset = self.copied(offset, 2, self.asking)
        square = (self.queries, self.heads, self.tokens)
        met = self.shaped(self.turned(met, (0, 1, 2, 4, 3)), square)
        scores = self.added(met, self.shaped(offset, square))
        if self.mask is None:
            return scores
        masks = self.mask.expand(self.windows, *self.mask.shape[1:])
        masks = masks.transpose(1, 2).reshape(square)
        feature = Feature(square, first=scores, axis=3)
        return self.builder.first(
            self.builder.element_affine(feature, torch.ones_like(masks), masks)
        )

    def _weighted(self, scores: str) -> tuple[Feature, Feature]:
        """R z and A V, (windows, queries, heads * channels) each."""
        value = self._given(self.value)
        axes, centres, kept = [], [], 1
        for head in range(self.heads):
            x = rows(self._of(value, head), -1).double()
            centre = x.mean(1, keepdim=True)
            energy, found = torch.linalg.eigh((x - centre) @ (x - centre).T / x.shape[1])
            energy, found = energy.clamp_min(0).flip(0), found.flip(1)
            left = energy.flip(0).cumsum(0)
            kept = max(kept, len(energy) - int((left <= _VALUE_ERROR * energy.sum()).sum()))
            axes.append(found.T)
            centres.append(centre)
        axes = [a[:kept] for a in axes]
        weights, unit = self._softmax(scores, value, axes)
        wide = self.heads * kept
        theirs = self._in_axes(self.value, [a / unit for a in axes], centres)
        x = self.site.given(self.tagged(weights))  # (B, queries, heads, keys)
        y = self._split(self.site.given(self.tagged(theirs)))  # (B, windows, heads, keys, axes)
        h = product(*self._sampled_sums(x, y), self.count)
        columns = self.turned(theirs, (0, 1, 3, 2))
        each = (self.heads, kept, self.tokens)
        met = self.hinge_sum(
            h,
            self.shaped(weights, (self.windows, self.asking, self.heads, 1, self.tokens)),
            self.shaped(columns, (self.windows, 1, *each)),
        )
        first = self.shaped(self.hinge_sum(h, weights, scale=-1.0), (self.queries, self.heads, 1))
        second = self.hinge_sum(h, self.shaped(columns, (self.windows, *each)), scale=-1.0)
        second = self.copied(self.shaped(second, (self.windows, 1, wide)), 2, self.asking)
        parts = (met, self.copied(first, 3, kept), second)
        z = self.added(*(self.shaped(part, (self.queries, wide)) for part in parts))
        z = self.shaped(z, (self.windows, self.asking, wide))
        return self._result(z, value, [a.T for a in axes])

    def _result(self, z: str, value: Tensor, axes: Sequence[Tensor]) -> tuple[Feature, Feature]:
        wanted = self.split_heads(self.site.wanted())
        products = self._split(self.site.given(self.tagged(z)))
        self.simpler = torch.empty_like(wanted)
        uniform = torch.full((self.asking, self.tokens), 1 / self.tokens)
        matrices = []
        for head in range(self.heads):
            values, goal = self._of(value, head), wanted[:, :, head]
            self.simpler[:, :, head] = mixing(values, goal).to(values) @ values
            rest = goal - products[:, :, head] @ axes[head].T.to(goal)
            matrices.append(ridge(rows(values, -2), rows(rest, -2), uniform, 1e-2))
        mixed = layers(self.builder, by_head(self.site, self.value), unshifted(matrices))
        mixed = turned(self.builder, mixed, (0, 3, 2, 1, 4), 4)
        joined = self.shaped(
            self.builder.first(mixed), (self.windows, self.asking, self.heads * wanted.shape[-1])
        )
        weighed = self.fixed(z, torch.block_diag(*axes))
        return self.tagged(weighed), self.tagged(joined)

    def _softmax(self, scores: str, value: Tensor, axes: Sequence[Tensor]) -> tuple[str, float]:
        """Weights unit * (p - 1 / keys), (queries of all windows, heads, keys), and the unit: it
        makes weights and what they weigh of one size.
        """
        square = (self.queries, self.heads, self.tokens)
        t = self.site.given(self.tagged(scores))
        below = t - t.amax(-1, keepdim=True)
        highest = self.shaped(scores, (self.queries * self.heads, self.tokens, 1))
        window = MaxPool(1, kernel=(self.tokens, 1))
        highest = self.builder.emit("highest", window, highest)
        highest = self.shaped(highest, (*square[:2], 1))
        e = curve(below.flatten(), below.exp().flatten(), _EXPONENTIAL)
        exponentials = self.hinge_sum(e, scores, highest, -1, 1 / self.tokens)
        exponentials = self.shaped(exponentials, (*square[:2], 1))
        mean = self.site.given(self.tagged(exponentials))
        log_sums = below.exp().mean(-1, keepdim=True).log()
        logarithm = curve(mean.flatten(), log_sums.flatten(), _LOGARITHM, side=-1, offset=True)
        level = self.shaped(self.hinge_sum(logarithm, exponentials), (*square[:2], 1))
        reference = self.added(highest, level)
        weights = t.softmax(-1)
        ratio = [
            float((self._of(value, head) @ axes[head].T.to(value)).std())
            for head in range(self.heads)
        ]
        unit = _CENTRE * math.sqrt(sum(ratio) / len(ratio) / max(float(weights.std()), 1e-6))
        reached = t - self.site.given(self.tagged(reference))
        g = curve(reached.flatten(), unit * weights.flatten(), _EXPONENTIAL)
        g = replace(g, offset=-unit / self.tokens)
        ours, theirs = (*square, 1), (*square[:2], 1, 1)
        return self.hinge_sum(
            g, self.shaped(scores, ours), self.shaped(reference, theirs), -1
        ), unit

    # -- what is given -------------------------------------------------------------------------

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, ..., heads, tokens, channels) as (B, windows, heads, tokens, channels)."""
        shape = x.shape if x.dim() > 3 else (x.shape[0], 1, *x.shape[1:])
        return x.reshape(shape[0], -1, *shape[-3:])

    def _given(self, feature: Feature) -> Tensor:
        return self.split_heads(self.site.given(feature))

    def _of(self, x: Tensor, head: int) -> Tensor:
        """What a head has of (B, windows, heads, tokens, channels)."""
        return x[:, :, head * x.shape[2] // self.heads]

    def _split(self, x: Tensor) -> Tensor:
        """(B, windows, tokens, heads * channels) as (B, windows, heads, tokens, channels)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(2, 3)

    def _draw(self, count: int, *sizes: int) -> list[Tensor]:
        return [torch.randint(size, (count,), generator=self.pick) for size in sizes]

    def _sampled(self, a: Tensor, b: Tensor, kept: int) -> tuple[Tensor, Tensor]:
        """Some pairs of a query and a key of one head, with all their axes."""
        count = math.ceil(_PRODUCTS / 8 / kept)
        sample, window, head = self._draw(count, *a.shape[:3])
        i, j = self._draw(count, self.asking, self.tokens)
        return a[sample, window, head, i], b[sample, window, head, j]

    def _sampled_sums(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Some rows of weights and one axis of the values that they weigh."""
        count = math.ceil(_PRODUCTS / 8 / self.tokens)
        sample, window, head = self._draw(count, *y.shape[:3])
        i, c = self._draw(count, self.asking, y.shape[-1])
        return x[sample, window * self.asking + i, head], y[sample, window, head, :, c]

    # -- steps ---------------------------------------------------------------------------------

    def _flat(self, feature: Feature) -> str:
        """(windows, tokens, heads * channels)."""
        shape = feature.shape
        heads = shape[-3] if len(shape) > 2 else 1
        name = self.shaped(self.builder.first(feature), (self.windows, heads, shape[-2], shape[-1]))
        if heads > 1:
            name = self.turned(name, (0, 1, 3, 2, 4))
        return self.shaped(name, (self.windows, shape[-2], heads * shape[-1]))

    def _block(self, matrices: Sequence[Tensor], feature: Feature) -> Tensor:
        """One matrix over (heads * channels) of a feature of those of each head."""
        theirs = feature.shape[-3] if len(feature.shape) > 2 else 1
        height, width = matrices[0].shape
        whole = torch.zeros(self.heads * height, theirs * width, dtype=torch.float64)
        for head, matrix in enumerate(matrices):
            start = head * theirs // self.heads * width
            whole[head * height : (head + 1) * height, start : start + width] = matrix
        return whole

    def _in_axes(self, feature: Feature, axes: Sequence[Tensor], centres: Sequence[Tensor]) -> str:
        """(windows, tokens, heads * axes) of a feature less its means."""
        matrix = self._block(axes, feature)
        shift = torch.cat([-(a @ c).squeeze(1) for a, c in zip(axes, centres, strict=True)])
        return self.fixed(self._flat(feature), matrix, shift)
