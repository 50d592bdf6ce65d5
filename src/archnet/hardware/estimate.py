"""Cycles that a target's own costs give a deployed graph: by them the cheapest way is taken.

The form is that of the table which the compiler of Rockchip's RK3588 prints: a layer takes the
larger of what its array and its memory take. The array works on tiles of positions and channels,
so that sizes are rounded up to these, and has a least depth, below which an output costs no less.
The constants are the target's (`hardware.costs`).
"""

import math
from collections.abc import Mapping, Sequence

from archnet.config import CostsConfig
from archnet.ops import (
    Activation,
    BatchNorm,
    Convolution,
    MatMul,
    Operator,
    Pad,
    Permute,
    Reshape,
    Slice,
    Step,
    WeightedOperator,
)


def estimate(
    steps: Sequence[Step],
    modules: Mapping[str, Operator],
    shapes: Mapping[str, tuple[int, ...]],
    costs: CostsConfig,
) -> dict[str, float]:
    """Cycles of each deployed step for one sample; a number takes one byte.

    Activations cost nothing: chips make them with the layer in front. Slices that part an axis are
    one `Split`, launched once.
    """
    found: dict[str, float] = {}
    parted: set[tuple[str, int]] = set()
    for step in steps:
        module, read = modules[step.name], [shapes[name] for name in step.inputs]
        if isinstance(module, Activation):
            found[step.name] = 0.0
            continue
        total = costs.launch + _work(module, read, shapes[step.name], costs)
        if isinstance(module, Slice):
            place = (step.inputs[0], module.axis)
            if not _is_of_channels(module, read[0]):
                total += costs.turn
            elif place in parted:
                total -= costs.launch
            parted.add(place)
        elif isinstance(module, Permute | Pad):
            total += costs.turn
        elif isinstance(module, Reshape) and _mixes_channels(read[0], shapes[step.name]):
            total += costs.turn + costs.regroup * math.prod(read[0])
        found[step.name] = total
    return found


def _work(
    module: Operator,
    read: Sequence[tuple[int, ...]],
    shape: tuple[int, ...],
    costs: CostsConfig,
) -> float:
    """The larger of what array and memory take."""
    count = math.prod(shape)
    moved = count + sum(map(math.prod, read))
    array = 0.0
    if isinstance(module, Slice | Reshape):
        moved = 2 * count
    elif isinstance(module, Convolution):
        array = _convolution(module, count // module.out_channels, costs)
        moved += module.weight.numel()
    elif isinstance(module, WeightedOperator):
        out, depth = module.weight.shape
        array = costs.mac * _tiles(count // out, costs.pixels) * _depth(depth, 1, costs)
        array *= _tiles(out, costs.channels)
        moved += module.weight.numel()
    elif isinstance(module, MatMul):
        depth = read[0][-1]
        rows = math.prod(shape[:-1])
        array = costs.mac * _tiles(rows, costs.pixels) * _depth(depth, 1, costs)
        array *= _tiles(shape[-1], costs.channels)
    elif isinstance(module, BatchNorm):
        moved += 2 * module.channels
    return max(array, costs.byte * moved)


def _convolution(module: Convolution, pixels: int, costs: CostsConfig) -> float:
    window, per_group = math.prod(module.kernel), module.in_channels // module.groups
    positions = _tiles(pixels, costs.pixels)
    if module.groups > 1 and per_group == 1:
        return costs.depthwise * positions * window * _tiles(module.out_channels, costs.channels)
    outputs = _tiles(module.out_channels // module.groups, costs.channels)
    return costs.mac * module.groups * positions * _depth(per_group, window, costs) * outputs


def _depth(channels: int, window: int, costs: CostsConfig) -> int:
    return max(costs.depth, window * _tiles(channels, costs.channels))


def _tiles(size: int, tile: int) -> int:
    """The next multiple of a tile."""
    return -(-size // tile) * tile


def _mixes_channels(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Whether a reshape makes other channels of a map's, and so a move of every number: chips keep
    the channels of a pixel together.
    """
    return len(before) == len(after) == 3 and before[0] != after[0]


def _is_of_channels(cut: Slice, shape: tuple[int, ...]) -> bool:
    """Whether a slice parts channels, as one split does: the first axis of a map, or the last."""
    return cut.step == 1 and cut.axis == (1 if len(shape) == 3 else len(shape))
