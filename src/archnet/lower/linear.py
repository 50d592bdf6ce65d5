"""Fully connected layers at every position (exact)."""

import math
from dataclasses import dataclass
from typing import Any

from archnet.lower.convolution import pointwise
from archnet.lower.draft import Draft, Weights
from archnet.lower.registry import Result, Way, cheapest, lowering
from archnet.ops import FullyConnected


@dataclass(frozen=True)
class Matrix:
    """A fully connected layer on the last axis: ``weights`` (O, I)."""

    weights: Weights

    def spec(self) -> dict[str, Any]:
        return {"shape": self.weights.shape}


def linear(weights: Weights, x: str, draft: Draft) -> str:
    """A fully connected layer on the last axis of a value, in the way that costs least."""
    ways = [Way("as it is", _as_it_is), Way("on a map", _on_a_map)]
    way, _ = cheapest(ways, Matrix(weights), (x,), draft, in_parts=False, chosen=draft.chosen)
    if way.build is not _as_it_is:
        draft.notes.append(way.name)
    result = way.build(Matrix(weights), (x,), draft)
    assert isinstance(result, str)
    return result


def _as_it_is(op: Matrix, inputs: tuple[str, ...], draft: Draft) -> Result:
    return draft.fully_connected(inputs[0], op.weights)


def _on_a_map(op: Matrix, inputs: tuple[str, ...], draft: Draft) -> Result:
    """A convolution on a map whose channels are what the layer reads."""
    (x,), shape = inputs, draft.shapes[inputs[0]]
    rank = len(shape) + 1
    if rank == 2 or draft.is_free:
        return None
    tall = draft.permute(x, (0, rank - 1, *range(1, rank - 1)))
    if rank != 4:
        tall = draft.reshape(tall, (shape[-1], math.prod(shape[:-1]), 1))
    done = pointwise(op.weights, tall, draft)
    done = draft.reshape(done, (op.weights.shape[0], *shape[:-1]))
    return draft.permute(done, (0, *range(2, rank), 1))


@lowering(FullyConnected)
def natively(op: FullyConnected, inputs: tuple[str, ...], draft: Draft) -> Result:
    """The layer itself."""
    return draft.emit("", op, *inputs, name=draft.step.name)


@lowering(FullyConnected)
def on_a_map(op: FullyConnected, inputs: tuple[str, ...], draft: Draft) -> Result:
    """A convolution, for a target whose layers read nothing but flat features."""
    return _on_a_map(Matrix(Weights.of(op)), inputs, draft)
