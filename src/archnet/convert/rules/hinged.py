"""Constant layers that make functions of one number, and products of two, out of hinges."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from archnet.convert.builder import Builder
from archnet.convert.feature import Feature
from archnet.convert.fit import Hinges
from archnet.ops import Activation, Concat, Permute, Reshape


class Layers:
    """Adds layers to a student, on values by name; shapes have no batch, axes count it as 0."""

    def __init__(self, builder: Builder) -> None:
        self.builder = builder

    def tagged(self, name: str) -> Feature:
        shape = self.builder.graph.shapes[name]
        return Feature(shape, first=name, axis=len(shape))

    def shaped(self, name: str, shape: tuple[int, ...]) -> str:
        if self.builder.graph.shapes[name] == shape:
            return name
        return self.builder.emit("shape", Reshape(shape), name)

    def turned(self, name: str, order: tuple[int, ...]) -> str:
        return self.builder.emit("order", Permute(order), name)

    def copied(self, name: str, axis: int, count: int) -> str:
        """The same ``count`` times beside itself along an axis (the batch is axis 0)."""
        if count == 1:
            return name
        return self.builder.emit("copies", Concat(axis), *[name] * count)

    def fixed(self, name: str, weight: Tensor, bias: float | Tensor = 0.0) -> str:
        """A constant fully connected layer."""
        offset = torch.as_tensor(bias, dtype=torch.float64).expand(len(weight))
        return self.builder.fully_connected(name, weight, offset, trainable=False)

    def units(self, f: Hinges, sources: Sequence[str], signs: tuple[int, ...]) -> str:
        """|a_k| max(d_k (sum of +- sources - t_k), 0) beside each other, of (..., 1) each."""
        joined = sources[0]
        if len(sources) > 1:
            axis = len(self.builder.graph.shapes[joined])
            joined = self.builder.emit("concat", Concat(axis), *sources)
        size = f.weights.abs() * f.sides
        row = torch.tensor(signs, dtype=torch.float64)
        lines = self.fixed(joined, size[:, None] * row, -size * f.knots)
        return self.builder.emit("act", Activation(0.0, math.inf), lines)

    def summed(self, units: str, f: Hinges, together: int, scale: float = 1.0) -> str:
        """F of units (..., n, K), added over every ``together`` of n: (..., n / together)."""
        *ahead, n, count = self.builder.graph.shapes[units]
        shape = (*ahead, n // together, together * count)
        signs = scale * f.weights.sign().repeat(together)[None]
        total = self.fixed(self.shaped(units, shape), signs, scale * together * f.offset)
        return self.shaped(total, shape[:-1])

    def total(self, names: Sequence[str], signs: tuple[int, ...]) -> str:
        """The sum of values of one shape."""
        shape = self.builder.graph.shapes[names[0]]
        ones = [self.shaped(name, (*shape, 1)) for name in names]
        joined = self.builder.emit("concat", Concat(len(shape) + 1), *ones)
        total = self.fixed(joined, torch.tensor([signs], dtype=torch.float64))
        return self.shaped(total, shape)
