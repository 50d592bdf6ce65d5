"""Closed-form fits of what replaces an operator to the teacher's values (no gradient step)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

_ROWS = 1024  # of each channel, enough to place two numbers
_SAMPLES = 2**16  # that a curve is fitted to
_LEVEL = 1 / 255  # of 8 bits, over the largest value
_CACHED = 2**17  # numbers that a core's cache holds beside others as many


def regression(inputs: Sequence[Tensor], wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares for every channel alone: wanted ~ sum_i a_i x_i + b.

    Args:
        inputs: (C, M) each.
        wanted: (C, M).

    Returns:
        (C, inputs) slopes and (C,) offsets, float64. A little ridge keeps a channel that never
        moves at a slope of zero.
    """
    x = torch.stack([item.double() for item in inputs], 1)  # (C, I, M)
    y = wanted.double()
    mean_x, mean_y = x.mean(2, keepdim=True), y.mean(1, keepdim=True)
    centred = x - mean_x
    gram = centred @ centred.transpose(1, 2) / x.shape[2]
    cross = centred @ (y - mean_y).unsqueeze(2) / x.shape[2]
    eye = torch.eye(x.shape[1], dtype=torch.float64)
    ridge = 1e-6 * gram.diagonal(dim1=1, dim2=2).mean(1) + 1e-12
    slopes = torch.linalg.solve(gram + ridge[:, None, None] * eye, cross).squeeze(2)
    return slopes, mean_y.squeeze(1) - (slopes * mean_x.squeeze(2)).sum(1)


def clipped_line(
    x: Tensor,
    wanted: Tensor,
    low: float,
    high: float,
    slopes: Sequence[float],
    offsets: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """For every channel the best of some lines a x + b under min(max(., low), high).

    Args:
        x: (C, M).
        wanted: (C, M).
        low, high: bounds.
        slopes, offsets: candidates for a and b; all pairs are tried.

    Returns:
        (C,) slopes and (C,) offsets, float64.
    """
    step = math.ceil(x.shape[1] / _ROWS)
    x, wanted = (part[:, ::step].contiguous() for part in (x, wanted))
    best = torch.full((len(x),), math.inf)
    slope, offset = torch.ones(len(x)), torch.zeros(len(x))
    some = max(1, _CACHED // x.shape[1])
    for start in range(0, len(x), some):
        part = slice(start, start + some)
        line, y = (torch.empty_like(x[part]) for _ in range(2))
        shifted = [(b, wanted[part] - b) for b in offsets]
        for a in slopes:
            torch.mul(x[part], a, out=line)
            for b, aim in shifted:  # min(max(a x + b, low), high) - b is a clip of the line
                torch.clamp(line, low - b, high - b, out=y).sub_(aim)
                error = torch.linalg.vector_norm(y, dim=1)
                better = error < best[part]
                best[part] = torch.where(better, error, best[part])
                slope[part] = slope[part].masked_fill(better, a)
                offset[part] = offset[part].masked_fill(better, b)
    return slope.double(), offset.double()


def ridge(x: Tensor, wanted: Tensor, prior: Tensor, share: float) -> Tensor:
    """min_W |W x - wanted|^2 + lambda |W - prior|^2.

    Args:
        x: (I, M).
        wanted: (O, M).
        prior: (O, I), what W is where data say nothing.
        share: lambda as a share of the mean energy of a row of ``x``.

    Returns:
        W (O, I), float64.
    """
    x, wanted, prior = x.double(), wanted.double(), prior.double()
    damping = share * x.square().sum(1).mean() + 1e-12
    rest = wanted - prior @ x
    # R X' (X X' + lambda I)^-1 = R (X' X + lambda I)^-1 X': the smaller matrix is solved for.
    fewer_samples = x.shape[1] < len(x)
    gram = x.T @ x if fewer_samples else x @ x.T
    gram.diagonal().add_(damping)
    if fewer_samples:
        return prior + torch.linalg.solve(gram, rest, left=False) @ x.T
    return prior + torch.linalg.solve(gram, rest @ x.T, left=False)


def mixing(values: Tensor, wanted: Tensor, share: float = 1e-2) -> Tensor:
    """The matrix over tokens that gives what attention gave, by ridge regression around 1/N.

    Attention with fixed weights is a token-mixing layer (Tolstikhin et al. 2021, arXiv
    2105.01601).

    Args:
        values: V (..., N, d).
        wanted: Y (..., M, d).
        share: see `ridge`.

    Returns:
        A (M, N), float64.
    """
    uniform = torch.full((wanted.shape[-2], values.shape[-2]), 1 / values.shape[-2])
    return ridge(rows(values, -2), rows(wanted, -2), uniform, share)


Layer = tuple[Tensor, Tensor]  # of a fully connected layer: weight (O, I) and bias (O,), float64


@dataclass(frozen=True)
class Attended:
    """One head of attention by fully connected layers and two rectifications (see `attended`).

    Attributes:
        offer: layer W of a token's key and value, [K; V].
        weights: A (M, N), over the tokens.
        answer: layer U of what a token receives beside its query, C = [A V; A F; Q].
        result: layer P of [C; max(U C, 0)].
        gain: what `weights` are larger by than those that mix alone, so that all of C has one size.
    """

    offer: Layer
    weights: Tensor
    answer: Layer
    result: Layer
    gain: float

    def mixed(self, values: Tensor) -> Tensor:
        """What the weights over tokens give of V (..., N, d) alone: (..., M, d)."""
        return (self.weights / self.gain).to(values) @ values


def attended(query: Tensor, key: Tensor, value: Tensor, wanted: Tensor) -> Attended:
    """softmax(Q K' / sqrt(d)) V where weights over tokens may not depend on the input.

    F = max(W [K; V], 0), C = [A V; A F; Q], Y = P [C; max(U C, 0)]: attention multiplies q k_j v_j
    and sums over tokens j; a rectified sum of two factors stands for their product, since
    x y = ((x + y)^2 - (x - y)^2) / 4 and hinges make squares. One rectification comes before the
    mixing (a key with its value), one behind it (a query with what was mixed). So does attention
    with a kernel split (Katharopoulos et al. 2020, arXiv 2006.16236): phi(q) sum_j phi(k_j) v_j'.

    No step of a gradient is taken. Rows of W measure a key by queries that occur, as a score does,
    and a value by values; rows of U a query by keys and what was mixed by the like of it; every
    one to a deviation of 1. A and P follow by ridge regression, P around A V alone.

    Args:
        query: Q (..., M, c).
        key, value: K (..., N, c) and V (..., N, d).
        wanted: Y (..., M, d).
    """
    width = value.shape[-1]
    weights = mixing(value, wanted)
    asked, keys, values = (rows(x, -1).double() for x in (query, key, value))
    offers = torch.cat([keys, values])
    offer = _likeness([(keys, asked), (values, values)], width)
    offered = _rectify(offer, offers).T.reshape(*value.shape).to(value)
    gain = (_size(query) or 1.0) / max(_size(weights.to(value) @ value), 1e-6)
    weights = weights * gain
    mixed = [rows(weights.to(value) @ x, -1).double() for x in (value, offered)]
    received = torch.cat([*mixed, asked])
    answer = _likeness([(torch.cat(mixed), torch.cat(mixed)), (asked, keys)], 2 * width)
    both = torch.cat([received, _rectify(answer, received)])
    prior = torch.eye(width, len(both), dtype=torch.float64) / gain
    y, mean = rows(wanted, -1).double(), both.mean(1, keepdim=True)
    matrix = ridge(both - mean, y - y.mean(1, keepdim=True), prior, 1e-3)
    bias = y.mean(1) - matrix @ mean.squeeze(1)
    return Attended(offer, weights, answer, (matrix, bias), gain)


def _likeness(pairs: Sequence[tuple[Tensor, Tensor]], count: int) -> Layer:
    """A layer that adds how much each of some features is like members of a population.

    Args:
        pairs: features (d, samples) and their population (d, members), each with as many channels.
        count: rows of the layer; each has one member of every population, evenly drawn.
    """
    parts, bias = [], torch.zeros(count, dtype=torch.float64)
    for index, (x, like) in enumerate(pairs):
        # Apart from each other by a part of the way between two members of one pair.
        places = (torch.arange(count) + (index + 1) / (len(pairs) + 1)) * like.shape[1] / count
        centre = x.mean(1, keepdim=True)
        weight = (like - like.mean(1, keepdim=True)).T[places.long()]
        deviation = (weight @ (x - centre)).std(1, keepdim=True)
        # Features that do not vary have nothing to say, however large their population is.
        weight = torch.where(deviation > 1e-6, weight / deviation, 0.0)
        parts.append(weight)
        bias = bias - (weight @ centre).squeeze(1)
    return torch.cat(parts, 1), bias


def _size(x: Tensor) -> float:
    """Root of the mean square."""
    return float(x.square().mean().sqrt())


def _rectify(layer: Layer, x: Tensor) -> Tensor:
    """max(W x + b, 0) of x (I, samples)."""
    weight, bias = layer
    return (weight @ x + bias[:, None]).clamp_min(0)


@dataclass(frozen=True)
class TokenNorm:
    """z / sigma of every token, by rectified sums (see `token_norm`); z is x - mean(x), or x itself
    where the norm does not centre.

    With r+ = max(z, 0), r- = max(-z, 0): sigma is nearly s = w [r+; r-], and z / s, a function of
    two numbers, nearly slope (r+ - r-) + sum_j a_j (max(z + v_j s - t_j, 0) - max(-z + v_j s - t_j,
    0)), the same for all channels.

    Attributes:
        deviation: w (2 C,), float64.
        slope: a number.
        hinges: (v, t, a) each.
    """

    deviation: Tensor
    slope: float
    hinges: tuple[tuple[float, float, float], ...]
    centred: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        """(M, C) -> (M, C)."""
        z = x - x.mean(1, keepdim=True) if self.centred else x
        s = torch.cat([z.clamp(min=0), (-z).clamp(min=0)], 1) @ self.deviation.to(x)[:, None]
        result = self.slope * z
        hinge, spare = torch.empty_like(z), torch.empty_like(z)
        for v, t, a in self.hinges:
            result += _odd_hinge(z, v * s - t, hinge, spare).mul_(a)
        return result


def _odd_hinge(z: Tensor, reach: Tensor, out: Tensor, spare: Tensor) -> Tensor:
    """max(z + reach, 0) - max(reach - z, 0), in ``out``; ``spare`` is of its size."""
    torch.sub(reach, z, out=spare).clamp_min_(0)
    return torch.add(reach, z, out=out).clamp_min_(0).sub_(spare)


_SLIGHT = 0.25  # slope, over the largest weight of a hinge, that is better none
# Of the hinges, with the mean deviation for a unit.
_REACHES = (-3, -2, -1.5, -1, -0.7, -0.5, -0.3, -0.15, 0, 0.15, 0.3, 0.5, 0.7, 1, 1.5, 2, 3)
_KNOTS = tuple(k / 4 for k in range(-16, 17))


def token_norm(x: Tensor, wanted: Tensor, count: int, centred: bool = True) -> TokenNorm:
    """What a layer norm does to a token, before its scale and shift, by rectified sums.

    The deviation is linear in the magnitudes, by ridge regression around their mean; the division
    by it is fitted by least squares on hinges that are chosen one after another out of a grid
    (orthogonal matching pursuit, Pati et al. 1993).

    Args:
        x: (M, C) tokens of the student.
        wanted: (M, C) the same tokens of the teacher, of mean 0 and deviation 1.
        count: of hinges.
        centred: whether the mean is taken off first; RMS norms do without.
    """
    step = math.ceil(x.numel() / 2**22)
    x, wanted = x[::step].double(), wanted[::step]
    z = x - x.mean(1, keepdim=True) if centred else x
    magnitudes = torch.cat([z.clamp(min=0), (-z).clamp(min=0)], 1)
    sigma = z.square().mean(1, keepdim=True).sqrt()
    level = float(sigma.mean() / magnitudes.sum(1).mean().clamp_min(1e-12))
    prior = torch.full((1, magnitudes.shape[1]), level, dtype=torch.float64)
    deviation = ridge(magnitudes.T, sigma.T, prior, 1e-3)[0]
    unit = float(sigma.mean().clamp_min(1e-12))
    picks = torch.randperm(z.numel(), generator=torch.Generator().manual_seed(0))[: 2**13]
    s = (magnitudes @ deviation)[picks // z.shape[1]] / unit
    z, y = z.flatten()[picks] / unit, wanted.flatten()[picks].double()
    grid = [(float(v), t) for v in _REACHES for t in _KNOTS]
    basis, spare = torch.empty(1 + len(grid), len(z), dtype=torch.float64), torch.empty_like(z)
    basis[0] = z
    for row, (v, t) in zip(basis[1:], grid, strict=True):
        _odd_hinge(z, v * s - t, row, spare)
    chosen, solution = _pursuit(basis, y, count + 1, [0])
    if count and bool(solution[0].abs() < _SLIGHT * solution[1:].abs().max()):
        # The magnitudes would share a grid with hinges many times as large.
        chosen, solution = _pursuit(basis[1:], y, count)
        chosen = [0, *(j + 1 for j in chosen)]
        solution = torch.cat([torch.zeros(1, dtype=torch.float64), solution])
    slope, *weights = (solution / unit).tolist()
    places = (grid[j - 1] for j in chosen[1:])
    hinges = tuple((v, t * unit, a) for (v, t), a in zip(places, weights, strict=True))
    return TokenNorm(deviation, slope, hinges, centred)


def _pursuit(
    basis: Tensor, wanted: Tensor, count: int, chosen: Sequence[int] = ()
) -> tuple[list[int], Tensor]:
    """Orthogonal matching pursuit: rows of ``basis`` chosen one after another, each with all before
    it by least squares; then each is exchanged for a better one as long as there is any.

    Args:
        basis: (J, M), float64.
        wanted: (M,).
        count: of rows in the end.
        chosen: rows to begin with, which stay.

    Returns:
        The rows, and what each is multiplied by.
    """
    some = max(1, _CACHED // basis.shape[1])
    parts = [
        (part @ wanted, torch.linalg.vector_norm(part, dim=1), part.amax(1), part.amin(1))
        for part in basis.split(some)
    ]
    cross, sizes, highest, lowest = (torch.cat(found) for found in zip(*parts, strict=True))
    energy, largest = sizes.square(), torch.maximum(highest, -lowest)
    # What rounding a row to 8 bits adds: rows whose weights nearly cancel would add too much.
    added = basis.shape[1] * (largest * _LEVEL).square() / 12
    ridge = 1e-9 * added.max() + 1e-18  # also where no row ever moves
    energy += added + 1e-12

    @cache
    def products(row: int) -> Tensor:
        """Of one row with all rows: that row of the Gram matrix."""
        found = basis @ basis[row]
        found[row] = energy[row]
        return found

    def best_beside(others: list[int]) -> tuple[int, float]:
        """The row that explains most of the energy beside the others, and how much all do.

        What a row adds to the others is by the Schur complement of their Gram matrix.
        """
        explained = cross.square() / (energy + ridge)
        if others:
            gram = torch.stack([products(row) for row in others])
            among = gram[:, others] + ridge * torch.eye(len(others), dtype=torch.float64)
            solved = torch.linalg.solve(among, torch.cat([cross[others, None], gram], 1))
            rest = cross - solved[:, 0] @ gram
            left = energy + ridge - (gram * solved[:, 1:]).sum(0)
            explained = cross[others] @ solved[:, 0] + rest.square() / left
        # A row beside itself has no least squares; it is not looked at.
        explained[others] = -math.inf
        found = int(explained.argmax())
        return found, float(explained[found])

    fixed, chosen, most = len(chosen), list(chosen), -math.inf
    while len(chosen) < count:
        row, most = best_beside(chosen)
        chosen.append(row)
    improved = True
    while improved:
        improved = False
        for place in range(fixed, count):
            row, explained = best_beside([*chosen[:place], *chosen[place + 1 :]])
            if row != chosen[place] and explained > most * (1 + 1e-6):
                chosen[place], most, improved = row, explained, True
    gram = torch.stack([products(row)[chosen] for row in chosen])
    return chosen, torch.linalg.solve(gram, cross[chosen])


@dataclass(frozen=True)
class Hinges:
    """sum_k a_k max(d_k (z - t_k), 0) + c.

    Attributes:
        knots: t (K,), float64.
        weights: a (K,), float64.
        sides: d (K,), 1 for a hinge that is open to the right of its knot, -1 for one to the left.
        offset: c.
    """

    knots: Tensor
    weights: Tensor
    sides: Tensor
    offset: float

    def __call__(self, z: Tensor) -> Tensor:
        total = torch.full(z.shape, self.offset, dtype=z.dtype)
        hinges = (self.knots.tolist(), self.weights.tolist(), self.sides.tolist())
        for x, y in zip(z.reshape(-1).split(_CACHED), total.view(-1).split(_CACHED), strict=True):
            spare = torch.empty_like(x)
            for t, a, d in zip(*hinges, strict=True):
                y.add_(torch.sub(x, t, out=spare).mul_(d).clamp_min_(0).mul_(a))
        return total


def curve(x: Tensor, wanted: Tensor, count: int, *, side: int = 1, offset: bool = False) -> Hinges:
    """A function of one number as a sum of hinges, for values that have long tails.

    Hinges that are all open to the flat side of a convex or concave function have weights of one
    sign: nothing cancels, and few bits hold it.

    Args:
        x, wanted: (M,).
        count: of hinges.
        side: 1 for hinges open to the right, -1 to the left.
        offset: whether there is one; without it the function is zero where all are closed.
    """
    if len(x) > _SAMPLES:
        # At random: neighbours are pixels or tokens, and a stride would meet the same ones.
        picks = torch.randint(len(x), (_SAMPLES,), generator=torch.Generator().manual_seed(0))
        x, wanted = x[picks], wanted[picks]
    x, wanted = x.double(), wanted.double()
    knots = _spaced(x)
    first = int(offset)
    basis = torch.ones(first + len(knots), len(x), dtype=torch.float64)
    for row, t in zip(basis[first:], knots.tolist(), strict=True):
        torch.sub(x, t, out=row).mul_(side).clamp_min_(0)
    chosen, found = _pursuit(basis, wanted, count + first, range(first))
    places = knots[torch.tensor(chosen[first:]) - first]
    sides = torch.full_like(places, side)
    return Hinges(places, found[first:], sides, float(found[0]) if offset else 0.0)


def product(x: Tensor, y: Tensor, count: int) -> Hinges:
    """Hinges f with f(x + y) - f(x) - f(y) nearly x y, chosen by what sums of products need.

    The algebra is that of x y = ((x + y)^2 - x^2 - y^2) / 2, a square being a sum of hinges; those
    left of zero are open to the left, so that f is small where its numbers are, and convex: no
    hinge has to cancel another.

    Args:
        x, y: (M, J) of about one size; what is compared is the sum over J.
        count: of hinges.
    """
    x, y = x.double(), y.double()
    both = x + y
    knots = _spaced(both.flatten())
    sides = torch.where(knots < 0, -1.0, 1.0).double()
    basis = torch.empty(1 + len(knots), len(x), dtype=torch.float64)
    basis[0] = x.shape[1]
    total, spare = torch.empty_like(x), torch.empty_like(x)
    for row, t, d in zip(basis[1:], knots.tolist(), sides.tolist(), strict=True):
        torch.sub(both, t, out=total).mul_(d).clamp_min_(0)
        for part in (x, y):
            total -= torch.sub(part, t, out=spare).mul_(d).clamp_min_(0)
        torch.sum(total, 1, out=row)
    chosen, found = _pursuit(basis, (x * y).sum(1), count + 1, [0])
    places = torch.tensor(chosen[1:]) - 1
    # f(x + y) - f(x) - f(y) has the offset of f once, and with its sign turned.
    return Hinges(knots[places], found[1:], sides[places], -float(found[0]))


def _spaced(x: Tensor) -> Tensor:
    """Candidates for knots between all but the ends of ``x``: evenly spaced in its range and in its
    order, half each way.
    """
    x = x[:: math.ceil(len(x) / 2**18)]
    shares = [*(k / 16 for k in range(1, 16)), 0.97, 0.98, 0.99, 0.995]
    low, high, *found = x.quantile(torch.tensor([1e-3, 1 - 1e-4, *shares], dtype=x.dtype)).split(1)
    even = low + (high - low) * torch.arange(16, dtype=x.dtype) / 16
    return torch.cat([even, *found]).sort().values


def balanced(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Axes in which x . y is a sum of products of one size each, the largest first.

    With covariances X = E[x x'] and Y = E[y y'], and X^(1/2) Y^(1/2) = U S W': x . y = a . b for
    a = S^(1/2) U' X^(-1/2) x and b = S^(1/2) W' Y^(-1/2) y, whose covariances are both S.

    Args:
        first, second: (C, samples), of mean zero.

    Returns:
        The matrices (C, C) of a and of b, and S (C,), float64.
    """
    roots, inverses = [], []
    for x in (first.double(), second.double()):
        energy, axes = torch.linalg.eigh(x @ x.T / x.shape[1])
        energy = energy.clamp_min(1e-9 * float(energy.max()) + 1e-30)
        roots.append(axes * energy.sqrt() @ axes.T)
        inverses.append(axes / energy.sqrt() @ axes.T)
    left, sizes, right = torch.linalg.svd(roots[0] @ roots[1])
    scale = sizes.sqrt()[:, None]
    return scale * left.T @ inverses[0], scale * right @ inverses[1], sizes


def rows(x: Tensor, axis: int) -> Tensor:
    """One axis first, everything else behind it: (size, samples)."""
    return x.movedim(axis, 0).flatten(1)


def relative_error(value: Tensor, wanted: Tensor) -> float:
    """|value - wanted| / |wanted|."""
    return float((value - wanted).norm() / wanted.norm().clamp_min(1e-12))
