"""Sums of hinges: layers of constants (exact)."""

import math

import torch

from archnet.lower.draft import Draft, Weights
from archnet.lower.linear import linear
from archnet.lower.registry import Result, lowering
from archnet.ops import HingeLines, HingeSum


@lowering(HingeLines)
def layer_on_copies(op: HingeLines, inputs: tuple[str, ...], draft: Draft) -> Result:
    """One layer on both numbers side by side; where one serves many of the other's, on copies."""
    shape = torch.broadcast_shapes(*(draft.shapes[name] for name in inputs))
    sides = [draft.reshape(_copied(name, shape, draft), (*shape, 1)) for name in inputs]
    return linear(Weights.of(op), draft.concat(sides, len(shape) + 1), draft)


def _copied(name: str, shape: tuple[int, ...], draft: Draft) -> str:
    """A value with its only entry along some axes as often as ``shape`` has entries there."""
    for axis, (have, want) in enumerate(zip(draft.shapes[name], shape, strict=True)):
        if have < want:
            before = draft.shapes[name]
            rows = (math.prod(before[:axis]), 1, math.prod(before[axis + 1 :]))
            copies = draft.concat([draft.reshape(name, rows)] * want, 2)
            name = draft.reshape(copies, (*before[:axis], want, *before[axis + 1 :]))
    return name


@lowering(HingeSum)
def layer_on_terms(op: HingeSum, inputs: tuple[str, ...], draft: Draft) -> Result:
    """One layer on all hinges of a sum."""
    *ahead, terms, count = draft.shapes[inputs[0]]
    rows = draft.reshape(inputs[0], (*ahead, terms * count))
    return draft.reshape(linear(Weights.of(op), rows, draft), tuple(ahead))
