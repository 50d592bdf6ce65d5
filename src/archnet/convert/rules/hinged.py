"""Constant layers that make functions of one number, and products of two, out of hinges."""

import math

import torch
from torch import Tensor

from archnet.convert.builder import Builder
from archnet.convert.feature import Feature
from archnet.convert.fit import Hinges
from archnet.ops import Activation, Concat, HingeLines, HingeSum, Permute, Reshape


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

    def hinge_sum(self, f: Hinges, x: str, y: str = "", sign: int = 1, scale: float = 1.0) -> str:
        """Scale * f(x), or scale * f(x + sign * y), added over the last axis.

        Where either of x and y has one entry along an axis, it serves all of the other's.
        """
        count = len(f.weights)
        lines = HingeLines(count, sign if y else 0)
        size = f.weights.abs() * f.sides
        columns = torch.tensor([1, sign][: lines.weight.shape[1]], dtype=torch.float64)
        with torch.no_grad():
            lines.weight.copy_(size[:, None] * columns)
            lines.bias.copy_(-size * f.knots)
        name = self.builder.emit("lines", lines, *filter(None, (x, y)))
        hinges = self.builder.emit("act", Activation(0.0, math.inf), name)
        terms = self.builder.graph.shapes[hinges][-2]
        total = HingeSum(terms, count)
        with torch.no_grad():
            total.weight.copy_(scale * f.weights.sign().repeat(terms))
            total.bias.fill_(scale * terms * f.offset)
        return self.builder.emit("sum", total, hinges)

    def added(self, *names: str) -> str:
        """The sum of values of one shape."""
        return self.builder.first(self.builder.add([self.tagged(name) for name in names]))
