"""Convolutions of any kernel, stride, dilation and grouping (exact)."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from archnet.lower.draft import Draft, Parts, Weights
from archnet.lower.registry import Result, Way, cheapest, lowering
from archnet.ops import Convolution, Operator
from archnet.ops.layout import windows
from archnet.ops.operators import Pair
from archnet.quant.quantizers import Quantizer

LARGEST_STACK = 7  # side of a kernel that is worth a stack of 3x3 convolutions
MOST_VIEWS = 256  # of a map beside each other; a window of 31x31 has 121 of three pixels


@dataclass(frozen=True)
class Dense:
    """A convolution without groups: ``weights`` (O, C, kh, kw)."""

    weights: Weights
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    @property
    def kernel(self) -> Pair:
        return (self.weights.shape[2], self.weights.shape[3])

    @property
    def extent(self) -> Pair:
        """Rows and columns from the first tap to the last."""
        (kh, kw), (dy, dx) = self.kernel, self.dilation
        return (dy * (kh - 1) + 1, dx * (kw - 1) + 1)

    def on(self, x: tuple[int, ...]) -> "Dense":
        """The same without the outer taps that meet nothing but padding on a map (C, H, W)."""
        weights, padding = without_idle_taps(
            self.weights, x, self.stride, self.padding, self.dilation
        )
        return replace(self, weights=weights, padding=padding)

    def size(self, x: tuple[int, ...]) -> Pair:
        """Rows and columns of the result on a map (C, H, W)."""
        rows, columns = (
            (n + 2 * p - e) // s + 1
            for n, p, e, s in zip(x[1:], self.padding, self.extent, self.stride, strict=True)
        )
        return (rows, columns)

    def spec(self) -> dict[str, Any]:
        return {
            "shape": self.weights.shape,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
        }


def without_idle_taps(
    weights: Weights, x: tuple[int, ...], stride: Pair, padding: Pair, dilation: Pair
) -> tuple[Weights, Pair]:
    """A kernel without as many taps on either side as never reach a map (C, H, W), and its padding.

    Tap t of output i reads pixel s i + d t - p.
    """
    idle = []
    for n, k, s, p, d in zip(x[1:], weights.shape[2:], stride, padding, dilation, strict=True):
        last = (n + 2 * p - d * (k - 1) - 1) // s * s
        reaches = [d * t - p < n and d * t - p + last >= 0 for t in range(k)]
        lead, trail = reaches.index(True), reaches[::-1].index(True)
        idle.append(min(lead, trail, p // d))
    if not any(idle):
        return weights, padding
    (top, left), (kh, kw) = idle, weights.shape[2:]
    shape = (*weights.shape[:2], kh - 2 * top, kw - 2 * left)
    cut = weights.changed(
        shape, lambda weight: weight[:, :, top : kh - top, left : kw - left].contiguous()
    )
    return cut, (padding[0] - dilation[0] * top, padding[1] - dilation[1] * left)


def dense(conv: Dense, x: str, draft: Draft) -> str:
    """A dense convolution in the way that costs least."""
    conv = conv.on(draft.shapes[x])
    way, _ = cheapest(_DENSE, conv, (x,), draft, in_parts=False, chosen=draft.chosen)
    if way.build is not as_it_is:
        draft.notes.append(way.name)
    result = way.build(conv, (x,), draft)
    assert isinstance(result, str)
    return result


# -- dense ---------------------------------------------------------------------------------------


def as_it_is(conv: Dense, inputs: tuple[str, ...], draft: Draft) -> Result:
    """One convolution."""
    how = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
    return draft.convolution(inputs[0], conv.weights, **how)


def within_3x3(conv: Dense, inputs: tuple[str, ...], draft: Draft) -> Result:
    """A window that fits into 3x3, zeros being the other taps.

    Tap t of a dilated window lies at d t - p from the pixel that a window of 3x3 with margin m has
    at m: it is its tap d t - p + m.
    """
    (x,), shape = inputs, draft.shapes[inputs[0]]
    if conv.stride[0] != conv.stride[1] or conv.stride[0] > 2 or conv.kernel == (3, 3):
        return None
    for margin in (1, 0):
        first = [margin - p for p in conv.padding]
        ends = [at + e for at, e in zip(first, conv.extent, strict=True)]
        wide = [(n + 2 * margin - 3) // conv.stride[0] + 1 for n in shape[1:]]
        rows, columns = conv.size(shape)
        if min(first) >= 0 and max(ends) <= 3 and wide[0] >= rows and wide[1] >= columns:
            break
    else:
        return None
    places = tuple(slice(at, end, d) for at, end, d in zip(first, ends, conv.dilation, strict=True))

    def embedded(weight: Tensor) -> Tensor:
        kernel = weight.new_zeros(*weight.shape[:2], 3, 3)
        kernel[:, :, places[0], places[1]] = weight
        return kernel

    weights = conv.weights.changed((*conv.weights.shape[:2], 3, 3), embedded)
    done = draft.convolution(x, weights, stride=conv.stride, padding=margin)
    return draft.slice(draft.slice(done, 2, 0, rows), 3, 0, columns)


def stack_of_3x3(conv: Dense, inputs: tuple[str, ...], draft: Draft) -> Result:
    """A kernel of up to 7x7 as 3x3 convolutions one after the other, without any move.

    The first ones are constant: they make nine copies of the map, moved by -1, 0 or 1 pixel to
    either side, and move these once more until they are r - 1 pixels away, for a kernel of 2 r + 1.
    The last one has the kernel's taps: tap t of an axis is its tap t - a of the copy moved by a,
    with a of t's own sign, so that zeros around a copy are zeros around the map.
    """
    (x,), channels = inputs, conv.weights.shape[1]
    radii = [k // 2 for k in conv.kernel]
    fits = (
        conv.dilation == (1, 1)
        and conv.stride[0] == conv.stride[1] <= 2
        and all(k % 2 and k <= LARGEST_STACK for k in conv.kernel)
        and tuple(radii) == conv.padding
        and max(radii) > 1
    )
    if not fits:
        return None
    sides = [[-1, 0, 1] if r > 1 else [0] for r in radii]
    moves = [(a, b) for a in sides[0] for b in sides[1]]
    for layer in range(max(radii) - 1):
        count = channels if layer == 0 else channels * len(moves)

        def shifts(layer: int = layer, count: int = count) -> Tensor:
            kernel = torch.zeros(channels * len(moves), count, 3, 3)
            for index, move in enumerate(moves):
                # An axis of a smaller radius has come to its place before.
                row, column = (
                    step if layer < r - 1 else 0 for step, r in zip(move, radii, strict=True)
                )
                for channel in range(channels):
                    to = index * channels + channel
                    kernel[to, channel if layer == 0 else to, 1 + row, 1 + column] = 1
            return kernel

        shape = (channels * len(moves), count, 3, 3)
        moved = draft.convolution(x, Weights.constant(shape, shifts, 1.0, draft))
        x = draft.passed_on(moved)

    def taps(weight: Tensor) -> Tensor:
        kernel = weight.new_zeros(len(weight), len(moves), channels, 3, 3)
        for i in range(conv.kernel[0]):
            for j in range(conv.kernel[1]):
                offsets = [t - r for t, r in zip((i, j), radii, strict=True)]
                move = tuple(
                    (o > 0) - (o < 0) if abs(o) > 1 else 0 for o in offsets
                )  # the copy that holds it
                left = [o - m * (r - 1) for o, m, r in zip(offsets, move, radii, strict=True)]
                at = moves.index((move[0], move[1]))
                kernel[:, at, :, 1 + left[0], 1 + left[1]] = weight[:, :, i, j]
        return kernel.flatten(1, 2)

    shape = (conv.weights.shape[0], channels * len(moves), 3, 3)
    return draft.convolution(x, conv.weights.changed(shape, taps), stride=conv.stride)


def stride_first(conv: Dense, inputs: tuple[str, ...], draft: Draft) -> Result:
    """A kernel of up to 7x7 with stride 2 as two 3x3 convolutions, the first with the stride.

    The first one is constant: its nine outputs a channel are the pixels at 2 i + a, with a from -1
    to 1. Tap u of the second one reads them at i + u, which is 2 i + (2 u + a): offsets from -3 to
    3. Where i + u lies outside, so does 2 (i + u) + a for the a of u's own sign, which it is read
    with.
    """
    (x,), channels = inputs, conv.weights.shape[1]
    radii = [k // 2 for k in conv.kernel]
    odd = all(k % 2 and k <= LARGEST_STACK for k in conv.kernel) and max(radii) > 1
    fits = odd and conv.dilation == (1, 1) and tuple(radii) == conv.padding
    if not fits or conv.stride != (2, 2):
        return None
    phases = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)]

    def picks() -> Tensor:
        kernel = torch.zeros(len(phases), channels, channels, 3, 3)
        every = torch.arange(channels)
        for index, (a, b) in enumerate(phases):
            kernel[index, every, every, 1 + a, 1 + b] = 1
        return kernel.flatten(0, 1)

    many = channels * len(phases)
    picked = Weights.constant((many, channels, 3, 3), picks, 1.0, draft)
    x = draft.passed_on(draft.convolution(x, picked, stride=2))

    def taps(weight: Tensor) -> Tensor:
        kernel = weight.new_zeros(len(weight), len(phases), channels, 3, 3)
        for i in range(conv.kernel[0]):
            for j in range(conv.kernel[1]):
                offsets = [t - r for t, r in zip((i, j), radii, strict=True)]
                tap = [(o > 0) - (o < 0) if abs(o) > 1 else 0 for o in offsets]
                phase = (offsets[0] - 2 * tap[0], offsets[1] - 2 * tap[1])
                at = phases.index(phase)
                kernel[:, at, :, 1 + tap[0], 1 + tap[1]] = weight[:, :, i, j]
        return kernel.flatten(1, 2)

    return draft.convolution(x, conv.weights.changed((conv.weights.shape[0], many, 3, 3), taps))


def views_and_1x1(conv: Dense, inputs: tuple[str, ...], draft: Draft) -> Result:
    """The window's views side by side (im2col by moves), and a matrix at every position.

    Patches that do not overlap are a reshape.
    """
    (out, channels, kh, kw), shape = conv.weights.shape, draft.shapes[inputs[0]]
    rows, columns = conv.size(shape)
    if conv.kernel == conv.stride == (1, 1) or kh * kw > MOST_VIEWS:
        return None
    x = draft.pad(inputs[0], (conv.padding[0],) * 2, (conv.padding[1],) * 2)
    if conv.stride == conv.kernel and conv.dilation == (1, 1):
        x = draft.slice(draft.slice(x, 2, 0, rows * kh), 3, 0, columns * kw)
        x = draft.reshape(x, (channels, rows, kh, columns, kw))
        x = draft.permute(x, (0, 1, 3, 5, 2, 4))
        x = draft.reshape(x, (channels * kh * kw, rows, columns))
        matrix = conv.weights.changed(
            (out, channels * kh * kw, 1, 1), lambda weight: weight.reshape(out, -1, 1, 1)
        )
    else:
        window = conv.kernel, conv.stride, conv.dilation
        x = draft.concat(windows(draft.slice, x, draft.shapes[x], *window), 1)
        matrix = conv.weights.changed(
            (out, channels * kh * kw, 1, 1),
            lambda weight: weight.permute(0, 2, 3, 1).reshape(out, -1, 1, 1),
        )
    return draft.convolution(x, matrix, padding=0)


def shifted_3x3(conv: Dense, inputs: tuple[str, ...], draft: Draft) -> Result:
    """Taps in groups of 3x3 neighbours: one view for each, one 3x3 convolution over all views.

    Of a stride above 2 every pixel is computed, and every s-th one kept.
    """
    (x,), shape = inputs, draft.shapes[inputs[0]]
    plain = conv.kernel == (3, 3) and conv.padding in ((0, 0), (1, 1))
    if plain and conv.dilation == (1, 1) and conv.stride in ((1, 1), (2, 2)):
        return None
    if math.prod(-(-side // 3) for side in conv.extent) > MOST_VIEWS:
        return None
    rows, columns = conv.size(shape)
    stride = conv.stride[0] if conv.stride[0] == conv.stride[1] <= 2 else 1
    views, tiles = shifted(draft, x, conv, stride)

    def tiled(weight: Tensor) -> Tensor:
        return torch.cat([tile(weight) for tile in tiles], 1)

    out, channels = conv.weights.shape[:2]
    weights = conv.weights.changed((out, channels * len(tiles), 3, 3), tiled)
    done = draft.convolution(draft.concat(views, 1), weights, stride=stride, padding=0)
    if stride != conv.stride[0] or stride != conv.stride[1]:
        ends = [(n - 1) * s + 1 for n, s in zip((rows, columns), conv.stride, strict=True)]
        done = draft.slice(done, 2, 0, ends[0], conv.stride[0])
        return draft.slice(done, 3, 0, ends[1], conv.stride[1])
    return draft.slice(draft.slice(done, 2, 0, rows), 3, 0, columns)


def shifted(draft: Draft, x: str, conv: Dense, stride: int) -> tuple[list[str], list[Any]]:
    """Views of a map that are moved by multiples of three pixels, and for each what takes its 3x3
    taps of a weight.
    """
    (height, width), (py, px), (dy, dx) = conv.extent, conv.padding, conv.dilation
    reach = [-(-height // 3) * 3, -(-width // 3) * 3]
    shape = draft.shapes[x]
    rows = (shape[1] + 2 * py - height) // stride * stride + 3
    columns = (shape[2] + 2 * px - width) // stride * stride + 3
    more = [
        max(0, n + r - 3 - have)
        for n, r, have in (
            (rows, reach[0], shape[1] + 2 * py),
            (columns, reach[1], shape[2] + 2 * px),
        )
    ]
    wide = draft.pad(x, (py, py + more[0]), (px, px + more[1]))
    views, tiles = [], []
    for y in range(0, reach[0], 3):
        if all((y + i) % dy for i in range(3)):
            continue  # a row of tiles between the taps of a dilated window
        across = draft.slice(wide, 2, y, y + rows)
        for left in range(0, reach[1], 3):
            if all((left + j) % dx for j in range(3)):
                continue

            def tile(weight: Tensor, y: int = y, left: int = left) -> Tensor:
                spread = weight.new_zeros(*weight.shape[:2], *reach)
                spread[:, :, :height:dy, :width:dx] = weight
                return spread[:, :, y : y + 3, left : left + 3]

            views.append(draft.slice(across, 3, left, left + columns))
            tiles.append(tile)
    return views, tiles


_DENSE = [
    Way(build.__name__.replace("_", " "), build)
    for build in (as_it_is, within_3x3, stack_of_3x3, stride_first, views_and_1x1, shifted_3x3)
]


# -- whole ---------------------------------------------------------------------------------------


@lowering(Convolution)
def natively(op: Convolution, inputs: tuple[str, ...], draft: Draft) -> Result:
    """The convolution itself; of copied channels the groups are brought together."""
    if op.groups == 1 or op.copies == 1:
        return draft.emit("", op, *inputs, name=draft.step.name)
    return None


@lowering(Convolution)
def dense_layer(op: Convolution, inputs: tuple[str, ...], draft: Draft) -> Result:
    """A convolution without groups; zeros are between groups where there are some."""
    weights = Weights.of(op)
    if op.groups > 1:
        shape = (op.out_channels, op.in_channels, *op.kernel)
        weights = weights.changed(shape, lambda weight: _expanded(weight, op.groups, op.copies))
    return dense(Dense(weights, op.stride, op.padding, op.dilation), inputs[0], draft)


def _expanded(weight: Tensor, groups: int, copies: int) -> Tensor:
    """The weight of a grouped layer (O, c, kh, kw) over all of its channels."""
    out, per_group = weight.shape[:2]
    full = weight.new_zeros(groups, out // groups, groups, per_group, *weight.shape[2:])
    every = torch.arange(groups)
    full[every, :, every] = weight.unflatten(0, (groups, -1))
    full = full.flatten(0, 1)  # (O, groups, per group, kh, kw)
    if copies > 1:
        full = full.unflatten(2, (copies, -1)).transpose(1, 2).flatten(2, 3)
    return full.flatten(1, 2)


@lowering(Convolution)
def lanes(op: Convolution, inputs: tuple[str, ...], draft: Draft) -> Result:
    """Lanes of channels, each a dense convolution of whole groups: fewer and wider ones where
    launches cost more than multiplications.
    """
    return grouped_lanes(Grouped.of(op, draft.shapes[inputs[0]]), inputs[0], draft)


@lowering(Convolution)
def channels_as_pixels(op: Convolution, inputs: tuple[str, ...], draft: Draft) -> Result:
    """Where every channel has the same few weights over its copies: one layer to one channel, over
    all pixels of all channels.
    """
    if not _is_sum_of_copies(op):
        return None
    row = Weights.of(op).rows(0, 1)
    row = row.changed((1, op.copies), lambda weight: weight.flatten(1))
    return over_channels(row, inputs[0], draft)


@lowering(Convolution)
def channels_at_the_end(op: Convolution, inputs: tuple[str, ...], draft: Draft) -> Result:
    """The same in lanes of channels that are brought to the end, which all have one small layer."""
    if not _is_sum_of_copies(op):
        return None
    (_, height, width), copies, channels = draft.shapes[inputs[0]], op.copies, op.out_channels

    def build(widest: int, draft: Draft) -> Result:
        lane = lane_of(channels, widest)
        if lane == channels:
            return None
        x = draft.reshape(inputs[0], (copies, channels // lane, lane, height * width))
        x = draft.permute(x, (0, 4, 2, 1, 3))
        x = draft.reshape(x, (height * width, channels // lane, copies * lane))
        weights = Weights.of(op).rows(0, lane)
        weights = weights.changed((lane, copies * lane), lambda w: _expanded_copies(w, copies))
        x = draft.reshape(draft.fully_connected(x, weights), (height * width, channels))
        return draft.reshape(draft.permute(x, (0, 2, 1)), (channels, height, width))

    spec = f"end {channels} {copies} {draft.shapes[inputs[0]]}"
    return in_lanes(channels, build, draft, spec)


def _expanded_copies(weight: Tensor, copies: int) -> Tensor:
    """Weights (L, copies, 1, 1) of single channels as a matrix (L, copies * L)."""
    return torch.cat([torch.diag(weight[:, copy, 0, 0]) for copy in range(copies)], 1)


def _is_sum_of_copies(op: Convolution) -> bool:
    """Whether every channel is the same sum of its copies."""
    single = op.groups == op.out_channels == op.in_channels // op.copies
    plain = op.kernel == op.stride == (1, 1) and op.padding == (0, 0)
    return single and plain and is_shared(op)


def over_channels(row: Weights, x: str, draft: Draft) -> str:
    """A layer (1, n) over n maps of as many channels each, one after the other."""
    count, (channels, height, width) = row.shape[1], draft.shapes[x]
    tall = draft.reshape(x, (count, channels // count * height, width))
    return draft.reshape(pointwise(row, tall, draft), (channels // count, height, width))


@lowering(Convolution)
def shifted_lanes(op: Convolution, inputs: tuple[str, ...], draft: Draft) -> Result:
    """Views moved by multiples of three pixels once for all lanes, a dense 3x3 in each."""
    return grouped_shifted_lanes(Grouped.of(op, draft.shapes[inputs[0]]), inputs[0], draft)


@dataclass(frozen=True)
class Grouped:
    """A convolution with groups: ``weights`` (O, C / groups, kh, kw)."""

    weights: Weights
    groups: int
    copies: int
    stride: Pair
    padding: Pair
    dilation: Pair

    @classmethod
    def of(cls, op: Convolution, x: tuple[int, ...]) -> "Grouped":
        """A layer on a map (C, H, W), without the taps that never reach it."""
        weights, padding = without_idle_taps(Weights.of(op), x, op.stride, op.padding, op.dilation)
        return cls(weights, op.groups, op.copies, op.stride, padding, op.dilation)

    def spec(self) -> dict[str, Any]:
        return {
            "shape": self.weights.shape,
            "groups": self.groups,
            "copies": self.copies,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
        }

    def lane(self, first: int, count: int) -> Dense:
        """Some groups as one dense convolution."""
        out, per_group = self.weights.shape[0] // self.groups, self.weights.shape[1]
        rows = self.weights.rows(first * out, (first + count) * out)
        shape = (count * out, count * per_group, *self.weights.shape[2:])
        weights = rows.changed(shape, lambda weight: _expanded(weight, count, self.copies))
        return Dense(weights, self.stride, self.padding, self.dilation)

    def together(self, lane: int) -> int:
        """How many groups are in a lane of so many channels."""
        return max(1, lane // self.width)

    @property
    def width(self) -> int:
        """Channels of a group, read or written, whichever are more."""
        return max(self.weights.shape[0] // self.groups, self.weights.shape[1] // self.copies)


def _lane_inputs(conv: Grouped, x: str, draft: Draft, together: int) -> list[str]:
    """What each lane reads of a map: its channels, of every copy."""
    channels = conv.groups * conv.weights.shape[1]
    copies = draft.split(x, 1, channels // conv.copies) if conv.copies > 1 else [x]
    size = together * conv.weights.shape[1] // conv.copies
    return [
        draft.concat(list(pieces), 1)
        for pieces in zip(*(draft.split(copy, 1, size) for copy in copies), strict=True)
    ]


def grouped_lanes(conv: Grouped, x: str, draft: Draft) -> Result:
    """Lanes of channels, as wide as costs least."""
    if conv.groups == 1:
        return None
    # Of few groups, such as the heads of an attention, each may be a lane of its own.
    few = conv.groups <= draft.target.lanes
    return in_lanes(
        conv.groups * conv.width,
        lambda lane, draft: _grouped_lanes(conv, x, draft, lane),
        draft,
        f"lanes {conv.spec()} {draft.shapes[x]}",
        narrowest=min(conv.width, draft.target.lanes) if few else None,
    )


def in_lanes(
    channels: int,
    build: Callable[[int, Draft], Result],
    draft: Draft,
    key: str,
    narrowest: int | None = None,
) -> Result:
    """The cheapest of several widths of lanes; ``key`` says of what, sizes included.

    Tried are the target's lanes (`hardware.lanes`), or ``narrowest`` ones, twice as wide ones, and
    so on.
    """
    key = f"{key} {draft.quantizer is not None}"
    if key not in draft.chosen:
        found, lane = (math.inf, 0), narrowest or draft.target.lanes
        while lane < channels:
            trial = draft.trial()
            if build(lane, trial) is not None and not trial.misfit:
                found = min(found, (trial.cycles, lane))
            lane *= 2
        draft.chosen[key] = found[1]
    lane = draft.chosen[key]
    return build(lane, draft) if lane else None


def _grouped_lanes(conv: Grouped, x: str, draft: Draft, lane: int) -> Result:
    """Lanes of at most so many channels."""
    together = conv.together(lane)
    if together >= conv.groups:
        return None
    inputs = _lane_inputs(conv, x, draft, together)
    names = [
        dense(conv.lane(first, min(together, conv.groups - first)), part, draft)
        for first, part in zip(range(0, conv.groups, together), inputs, strict=True)
    ]
    return Parts(tuple(names), 1)


def grouped_shifted_lanes(conv: Grouped, x: str, draft: Draft) -> Result:
    """Lanes of 3x3 convolutions over views that all of them share, as wide as costs least."""
    kernel, stride = conv.weights.shape[2:], conv.stride
    square = stride[0] == stride[1] <= 2
    if conv.groups == 1 or max(kernel) <= 3 or not square or conv.copies > 1:
        return None
    if math.prod(-(-side // 3) for side in kernel) > MOST_VIEWS:
        return None
    return in_lanes(
        conv.groups * conv.weights.shape[1],
        lambda lane, draft: _shifted_lanes(conv, x, draft, lane),
        draft,
        f"shifted {conv.spec()} {draft.shapes[x]}",
    )


def _shifted_lanes(conv: Grouped, x: str, draft: Draft, lane: int) -> Result:
    together, kernel, stride = conv.together(lane), conv.weights.shape[2:], conv.stride
    channels = conv.groups * conv.weights.shape[1]
    whole = Dense(
        Weights.constant((1, channels, *kernel), lambda: torch.zeros(()), 1.0, draft),
        conv.stride,
        conv.padding,
        conv.dilation,
    )
    rows, columns = whole.size(draft.shapes[x])
    views, tiles = shifted(draft, x, whole, stride[0])
    parted = [_lane_inputs(conv, view, draft, together) for view in views]
    names = []
    for index, first in enumerate(range(0, conv.groups, together)):
        part = conv.lane(first, min(together, conv.groups - first))
        out, width = part.weights.shape[:2]

        def tiled(weight: Tensor) -> Tensor:
            return torch.cat([tile(weight) for tile in tiles], 1)

        weights = part.weights.changed((out, width * len(tiles), 3, 3), tiled)
        joined = draft.concat([parts[index] for parts in parted], 1)
        done = draft.convolution(joined, weights, stride=stride, padding=0)
        names.append(draft.slice(draft.slice(done, 2, 0, rows), 3, 0, columns))
    return Parts(tuple(names), 1)


def pointwise(weights: Weights, x: str, draft: Draft) -> str:
    """A matrix (O, C) at every position of a map."""
    matrix = weights.changed((*weights.shape, 1, 1), lambda weight: weight[:, :, None, None])
    return dense(Dense(matrix), x, draft)


def is_shared(op: Operator) -> bool:
    """Whether a constant layer has the same weights and the same grid for every output."""
    if not isinstance(op, Convolution) or op.trainable:
        return False
    numbers = [op.weight, op.bias]
    if isinstance(op.weight_quantizer, Quantizer):
        numbers.append(op.weight_quantizer.log_scale)
    return all(bool((tensor == tensor[:1]).all()) for tensor in numbers)


def lane_of(channels: int, widest: int) -> int:
    """The widest lane that divides the channels evenly."""
    return max(d for d in range(1, max(1, widest) + 1) if channels % d == 0)
