"""Additions, of constants too, average pooling and means (exact)."""

import math

import torch

from archnet.lower.convolution import (
    Grouped,
    dense,
    grouped_lanes,
    grouped_shifted_lanes,
    in_lanes,
    lane_of,
    over_channels,
    pointwise,
)
from archnet.lower.draft import Draft, Parts, Weights
from archnet.lower.linear import linear
from archnet.lower.registry import Result, lowering
from archnet.ops import Add, AddConstant, AveragePool, BatchNorm, Mean

# -- additions -----------------------------------------------------------------------------------


@lowering(Add)
def natively(op: Add, inputs: tuple[str, ...], draft: Draft) -> Result:
    """The target's own addition, of two values at a time where there are more."""
    if len(inputs) > 2:
        return None  # what is between would be rounded once more
    return draft.emit("", op, *inputs, name=draft.step.name)


@lowering(Add)
def concat_and_dense(op: Add, inputs: tuple[str, ...], draft: Draft) -> Result:
    """One concatenation and one constant layer [I, I], over all channels.

    It is a 1x1 convolution on a map, else a fully connected layer on the last axis.
    """
    shape = draft.shapes[inputs[0]]
    if len(shape) == 3:
        return pointwise(_identities(draft, shape[0], len(inputs)), draft.concat(inputs, 1), draft)
    joined = draft.concat(inputs, len(shape))
    return linear(_identities(draft, shape[-1], len(inputs)), joined, draft)


@lowering(Add)
def channels_as_pixels(op: Add, inputs: tuple[str, ...], draft: Draft) -> Result:
    """On a map: one layer from n channels to one, over all pixels of all channels."""
    if len(draft.shapes[inputs[0]]) != 3:
        return None
    count = len(inputs)
    ones = Weights.constant((1, count), lambda: torch.ones(1, count), 1.0, draft)
    return over_channels(ones, draft.concat(inputs, 1), draft)


@lowering(Add)
def concat_and_lanes(op: Add, inputs: tuple[str, ...], draft: Draft) -> Result:
    """The same in lanes of channels, which all have one small layer."""
    shape = draft.shapes[inputs[0]]
    if draft.is_free:
        return None

    def build(width: int, draft: Draft) -> Result:
        lane = lane_of(shape[-1], width)
        if lane == shape[-1]:
            return None
        lanes = (*shape[:-1], shape[-1] // lane, lane)
        joined = draft.concat([draft.reshape(name, lanes) for name in inputs], len(lanes))
        total = linear(_identities(draft, lane, len(inputs)), joined, draft)
        return draft.reshape(total, shape)

    return in_lanes(shape[-1], build, draft, f"join {len(inputs)} {shape}")


@lowering(Add)
def split_and_lanes(op: Add, inputs: tuple[str, ...], draft: Draft) -> Result:
    """On a map: a layer for each lane of channels."""
    shape = draft.shapes[inputs[0]]
    if len(shape) != 3:
        return None

    def build(width: int, draft: Draft) -> Result:
        lane = lane_of(shape[0], width)
        if lane == shape[0]:
            return None
        parts = zip(*(draft.split(name, 1, lane) for name in inputs), strict=True)
        identities = _identities(draft, lane, len(inputs))
        names = [pointwise(identities, draft.concat(part, 1), draft) for part in parts]
        return Parts(tuple(names), 1)

    return in_lanes(shape[0], build, draft, f"split {len(inputs)} {shape}")


def _identities(draft: Draft, channels: int, terms: int) -> Weights:
    shape = (channels, channels * terms)
    return Weights.constant(shape, lambda: torch.eye(channels).repeat(1, terms), 1.0, draft)


# -- constants -----------------------------------------------------------------------------------


@lowering(AddConstant)
def added_natively(op: AddConstant, inputs: tuple[str, ...], draft: Draft) -> Result:
    """The target's own addition, of a constant."""
    return draft.emit("", op, *inputs, name=draft.step.name)


@lowering(AddConstant)
def norm_of_elements(op: AddConstant, inputs: tuple[str, ...], draft: Draft) -> Result:
    """Flattened, every element is a channel of a batch norm, which multiplies by one."""
    shape = draft.shapes[inputs[0]]
    count = math.prod(shape)
    with torch.device("meta" if draft.is_dry else draft.device):
        norm = BatchNorm(count, eps=0.0)
    if not draft.is_dry:
        norm.bias.data.copy_(op.bias.expand(shape).flatten())
    flat = draft.reshape(inputs[0], (count,))
    return draft.reshape(draft.emit("norm", norm, flat), shape)


# -- average pooling -----------------------------------------------------------------------------


@lowering(AveragePool)
def pooled_natively(op: AveragePool, inputs: tuple[str, ...], draft: Draft) -> Result:
    """The target's own average pooling, where it divides by the window's pixels."""
    return draft.emit("", op, *inputs, name=draft.step.name) if op.is_mean else None


@lowering(AveragePool)
def windows_and_layer(op: AveragePool, inputs: tuple[str, ...], draft: Draft) -> Result:
    """Windows that do not overlap lie at the end of a reshape, and a layer adds each."""
    if op.stride != op.kernel or any(op.padding):
        return None
    (channels, height, width), (kh, kw) = draft.shapes[inputs[0]], op.kernel
    rows, columns = height // kh, width // kw
    x = draft.slice(draft.slice(inputs[0], 2, 0, rows * kh), 3, 0, columns * kw)
    x = draft.permute(draft.reshape(x, (channels, rows, kh, columns, kw)), (0, 1, 2, 4, 3, 5))
    x = draft.reshape(x, (channels, rows, columns, kh * kw))
    total = linear(_row(draft, kh * kw, op.factor), x, draft)
    return draft.reshape(total, (channels, rows, columns))


def _depthwise(op: AveragePool, draft: Draft, channels: int) -> Grouped:
    shape = (channels, 1, *op.kernel)
    weights = Weights.constant(shape, lambda: torch.ones(shape), op.factor, draft)
    return Grouped(weights, channels, 1, op.stride, op.padding, (1, 1))


@lowering(AveragePool)
def dense_layer(op: AveragePool, inputs: tuple[str, ...], draft: Draft) -> Result:
    """A dense convolution with a diagonal of constants."""
    channels = draft.shapes[inputs[0]][0]
    lane = _depthwise(op, draft, channels).lane(0, channels)
    return dense(lane, inputs[0], draft)


@lowering(AveragePool)
def lanes(op: AveragePool, inputs: tuple[str, ...], draft: Draft) -> Result:
    """The same in lanes of channels."""
    conv = _depthwise(op, draft, draft.shapes[inputs[0]][0])
    return grouped_lanes(conv, inputs[0], draft)


@lowering(AveragePool)
def shifted_lanes(op: AveragePool, inputs: tuple[str, ...], draft: Draft) -> Result:
    """The same over views moved by multiples of three pixels."""
    conv = _depthwise(op, draft, draft.shapes[inputs[0]][0])
    return grouped_shifted_lanes(conv, inputs[0], draft)


# -- means ---------------------------------------------------------------------------------------


@lowering(Mean)
def reduced_natively(op: Mean, inputs: tuple[str, ...], draft: Draft) -> Result:
    """The target's own mean or sum over axes."""
    plain = op.factor in (1.0, 1 / op.terms([draft.shapes[inputs[0]]]))
    return draft.emit("", op, *inputs, name=draft.step.name) if plain else None


@lowering(Mean)
def flat_and_layer(op: Mean, inputs: tuple[str, ...], draft: Draft) -> Result:
    """The axes at the end, as one, and a layer from so many entries to one."""
    x, kept, count = _axes_last(op, inputs[0], draft)
    total = linear(_row(draft, count, op.factor), draft.reshape(x, (*kept, count)), draft)
    return draft.reshape(total, kept)


@lowering(Mean)
def flat_lanes(op: Mean, inputs: tuple[str, ...], draft: Draft) -> Result:
    """Lanes of flattened results, for a target whose layers read nothing but flat features."""
    x, kept, count = _axes_last(op, inputs[0], draft)
    results = math.prod(kept)
    rows = draft.reshape(x, (results, count))
    names = []
    for part in draft.split(rows, 1, draft.target.lanes):
        size = draft.shapes[part][0]

        def block(size: int = size) -> torch.Tensor:
            return torch.kron(torch.eye(size), torch.ones(1, count))

        weights = Weights.constant((size, size * count), block, op.factor, draft)
        names.append(draft.fully_connected(draft.reshape(part, (size * count,)), weights))
    if len(names) == 1:
        return draft.reshape(names[0], kept)
    if len(kept) == 1:
        return Parts(tuple(names), 1)
    # Parts of what has more axes would have to be joined before they are moved.
    return None


@lowering(Mean)
def convolutions(op: Mean, inputs: tuple[str, ...], draft: Draft) -> Result:
    """Over all pixels of a map: one convolution with a window as large as the map, in lanes."""
    shape = draft.shapes[inputs[0]]
    if len(shape) != 3 or op.axes != (2, 3):
        return None
    pool = AveragePool(shape[1:], 1, 0, op.factor)
    conv = _depthwise(pool, draft, shape[0])
    return draft.reshape(dense(conv.lane(0, shape[0]), inputs[0], draft), shape[:1])


def _axes_last(op: Mean, x: str, draft: Draft) -> tuple[str, tuple[int, ...], int]:
    """A value with the reduced axes after the others, the others' sizes, and their entries."""
    shape = draft.shapes[x]
    kept = [axis for axis in range(1, len(shape) + 1) if axis not in op.axes]
    x = draft.permute(x, (0, *kept, *op.axes))
    count = math.prod(shape[axis - 1] for axis in op.axes)
    return x, tuple(shape[axis - 1] for axis in kept), count


def _row(draft: Draft, count: int, factor: float) -> Weights:
    return Weights.constant((1, count), lambda: torch.ones(1, count), factor, draft)
