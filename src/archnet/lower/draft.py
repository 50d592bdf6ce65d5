"""A deployed graph in the making: what lowerings build with, and what they build."""

import math
from collections import ChainMap
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from archnet.hardware.estimate import estimate
from archnet.hardware.layers import layer_of
from archnet.hardware.target import Target
from archnet.ops import (
    Activation,
    Concat,
    Convolution,
    FullyConnected,
    MaxPool,
    Operator,
    Pad,
    Permute,
    Reshape,
    Slice,
    Step,
    WeightedOperator,
)
from archnet.ops.operators import split
from archnet.ops.shapes import result_shape
from archnet.quant.quantizers import BiasQuantizer, Quantizer, WeightLSQ


@dataclass(frozen=True)
class WeightGrid:
    """The grid of a layer's weights: ``log_scale`` is (O,) or (1,), ``source`` the quantizer of
    what the layer reads, None where that is float.
    """

    bits: int
    log_scale: Tensor
    power_of_two: bool
    source: Quantizer | None


@dataclass(frozen=True)
class Weights:
    """Weight and bias of a layer, computed when they are asked for.

    Ways are compared by what they cost before one of them is built; only its weights exist.

    Attributes:
        shape: of the weight, (O, ...).
        numbers: gives weight and bias (O,), on their grids where they have any.
        grid: of the weight; None where it is float.
        trainable: False for constants.
    """

    shape: tuple[int, ...]
    numbers: Callable[[], tuple[Tensor, Tensor]]
    grid: WeightGrid | None
    trainable: bool = True

    @classmethod
    def of(cls, operator: WeightedOperator) -> "Weights":
        """Those of a whole layer, as it computes with them."""

        @cache
        def numbers() -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                weight, bias = operator.parameters_on_grid()
            return weight.detach(), bias.detach()

        quantizer, biases = operator.weight_quantizer, operator.bias_quantizer
        grid = None
        if isinstance(quantizer, Quantizer):
            source = biases.source if isinstance(biases, BiasQuantizer) else None
            grid = WeightGrid(
                quantizer.bits, quantizer.log_scale.detach(), quantizer.power_of_two, source
            )
        return cls(tuple(operator.weight.shape), numbers, grid, operator.trainable)

    @classmethod
    def constant(
        cls, shape: tuple[int, ...], ones: Callable[[], Tensor], factor: float, draft: "Draft"
    ) -> "Weights":
        """Zeros and ones times a factor, for a layer on what the whole operator reads."""
        number, unit, is_exact = split(factor)

        def numbers() -> tuple[Tensor, Tensor]:
            weight = ones().to(draft.device, torch.float32) * number * unit
            return weight, torch.zeros(shape[0], device=draft.device)

        grid = None
        if draft.quantizer is not None:
            log_scale = torch.tensor([math.log(unit)], device=draft.device)
            grid = WeightGrid(max(2, number.bit_length() + 1), log_scale, is_exact, draft.quantizer)
        return cls(shape, numbers, grid, trainable=False)

    def changed(self, shape: tuple[int, ...], work: Callable[[Tensor], Tensor]) -> "Weights":
        """The same outputs, their weights in another arrangement, with zeros or without some."""

        def numbers() -> tuple[Tensor, Tensor]:
            weight, bias = self.numbers()
            return work(weight), bias

        return replace(self, shape=shape, numbers=numbers)

    def rows(self, first: int, last: int) -> "Weights":
        """Some of the outputs."""

        def numbers() -> tuple[Tensor, Tensor]:
            weight, bias = self.numbers()
            return weight[first:last], bias[first:last]

        grid = self.grid
        if grid is not None and grid.log_scale.numel() > 1:
            grid = replace(grid, log_scale=grid.log_scale[first:last])
        return replace(self, shape=(last - first, *self.shape[1:]), numbers=numbers, grid=grid)

    def install(self, module: WeightedOperator) -> None:
        """Give a layer these weights, its grid and that of its bias."""
        weight, bias = self.numbers()
        module.weight = nn.Parameter(weight.float().reshape(self.shape).contiguous(), False)
        module.bias = nn.Parameter(bias.float().contiguous(), False)
        self.install_grid(module)

    def install_grid(self, module: WeightedOperator) -> None:
        """Give a layer its grid and that of its bias, which say what it costs."""
        if self.grid is None:
            return
        bits = self.grid.bits
        if bits == 1 and bool((self.numbers()[0] == 0).any()):
            bits = 2  # one bit has no zero
        quantizer = WeightLSQ(bits, self.grid.log_scale.numel(), self.grid.power_of_two)
        quantizer.log_scale = nn.Parameter(self.grid.log_scale.clone(), False)
        module.weight_quantizer = quantizer
        if self.grid.source is not None:
            module.bias_quantizer = BiasQuantizer(quantizer, self.grid.source)


@dataclass(frozen=True)
class Parts:
    """A result in pieces that lie side by side along an axis (the batch is axis 0).

    ``highest`` are upper bounds of the pieces, whose lower one is then 0; without them they have
    none.
    """

    names: tuple[str, ...]
    axis: int
    highest: tuple[float, ...] = ()

    @property
    def bounds(self) -> Sequence[tuple[float, float]]:
        """The lowest and the highest value of each piece."""
        if self.highest:
            return [(0.0, high) for high in self.highest]
        return [(-math.inf, math.inf)] * len(self.names)


@dataclass
class Draft:
    """Deployed steps. Values are known by name; shapes have no batch, axes count it as 0.

    Attributes:
        target: what it is for.
        device: of weights.
        shapes: of every value.
        step: the whole step at work.
        quantizer: of what it reads; None where that is float.
        is_dry: whether layers are made for their cost alone, without weights.
        is_free: whether positions are those of a sentence, whose number no reshape may name.
        whole: the whole step that each deployed step belongs to.
        notes: in which ways parts of an operator were written.
        chosen: by operator and sizes, the way that was found cheapest.
        reserved: names of the whole student's values.
        joined: of values that were concatenated, the axis and the pieces.
        counts: for the start of a name, the last number that was appended.
    """

    target: Target
    device: torch.device
    shapes: MutableMapping[str, tuple[int, ...]]
    step: Step = field(default_factory=lambda: Step("", ()))
    quantizer: Quantizer | None = None
    is_dry: bool = False
    is_free: bool = False
    steps: list[Step] = field(default_factory=list)
    modules: dict[str, Operator] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    chosen: dict[str, int] = field(default_factory=dict)
    reserved: set[str] = field(default_factory=set)
    joined: MutableMapping[str, tuple[int, tuple[str, ...]]] = field(default_factory=dict)
    counts: MutableMapping[str, int] = field(default_factory=dict)

    def trial(self) -> "Draft":
        """An empty draft beside this one, without weights."""
        return replace(
            self,
            shapes=ChainMap({}, self.shapes),
            joined=ChainMap({}, self.joined),
            counts=ChainMap({}, self.counts),
            is_dry=True,
            steps=[],
            modules={},
            whole={},
            notes=[],
        )

    def emit(
        self,
        kind: str,
        module: Operator,
        *inputs: str,
        name: str = "",
        shape: tuple[int, ...] | None = None,
    ) -> str:
        """Add a step, and give the name of its value: ``name``, or one with ``kind`` in it."""
        stem = f"{self.step.name}_{kind}"
        while not name:
            count = self.counts[stem] = self.counts.get(stem, 0) + 1
            wanted = stem if count == 1 else f"{stem}{count}"
            name = "" if wanted in self.shapes or wanted in self.reserved else wanted
        read = [self.shapes[item] for item in inputs]
        self.shapes[name] = result_shape(module, read) if shape is None else shape
        self.steps.append(Step(name, inputs, self.step.origin))
        self.modules[name] = module
        self.whole[name] = self.step.name
        if isinstance(module, Concat):
            self.joined[name] = module.axis, inputs
        return name

    def named(self, value: str, name: str) -> str:
        """Give a value that an operator's steps end with the name of the whole one, if it is free:
        moves of nothing hand on a value that has a name already.
        """
        is_last = bool(self.steps) and value == self.steps[-1].name
        if not is_last or self.whole[value] != self.step.name or name in self.shapes:
            return value
        self.steps[-1] = replace(self.steps[-1], name=name)
        self.modules[name] = self.modules.pop(value)
        self.shapes[name] = self.shapes.pop(value)
        self.whole[name] = self.whole.pop(value)
        if value in self.joined:
            self.joined[name] = self.joined.pop(value)
        return name

    # -- layers ----------------------------------------------------------------------------------

    def convolution(self, x: str, weights: Weights, **how: Any) -> str:
        """A convolution; ``how`` as in `archnet.ops.Convolution`, without channels and kernel."""
        out, per_group, *kernel = weights.shape
        groups = how.get("groups", 1)
        return self._layer(
            "conv",
            lambda: Convolution(
                per_group * groups, out, kernel, trainable=weights.trainable, **how
            ),
            x,
            weights,
        )

    def fully_connected(self, x: str, weights: Weights) -> str:
        """A fully connected layer on the last axis."""
        out, features = weights.shape
        return self._layer(
            "fc", lambda: FullyConnected(features, out, weights.trainable), x, weights
        )

    def _layer(
        self, kind: str, make: Callable[[], WeightedOperator], x: str, weights: Weights
    ) -> str:
        with torch.device("meta"):
            module = make()
        if self.is_dry:
            weights.install_grid(module)
        else:
            weights.install(module)
        return self.emit(kind, module, x)

    def passed_on(self, name: str) -> str:
        """Values that a constant layer has copied, on the grid of what the operator reads."""
        if self.quantizer is None:
            return name
        place = Activation()
        place.quantizer = self.quantizer
        return self.emit("grid", place, name)

    # -- moves -----------------------------------------------------------------------------------

    def slice(self, x: str, axis: int, start: int, stop: int, step: int = 1) -> str:
        if (start, step) == (0, 1) and stop >= self.shapes[x][axis - 1]:
            return x
        return self.emit("slice", Slice(axis, start, stop, step), x)

    def split(self, x: str, axis: int, size: int) -> list[str]:
        """Pieces of ``size`` along an axis, the last one what is left; those that a value was
        joined of are found again.
        """
        whole = self.shapes[x][axis - 1]
        along, pieces = self.joined.get(x, (0, ()))
        if along == axis and all(self.shapes[piece][axis - 1] == size for piece in pieces):
            return list(pieces)
        return [self.slice(x, axis, at, min(at + size, whole)) for at in range(0, whole, size)]

    def reshape(self, x: str, shape: tuple[int, ...]) -> str:
        return x if self.shapes[x] == shape else self.emit("reshape", Reshape(shape), x)

    def permute(self, x: str, order: tuple[int, ...]) -> str:
        return x if order == tuple(range(len(order))) else self.emit("order", Permute(order), x)

    def pad(self, x: str, rows: tuple[int, int], columns: tuple[int, int]) -> str:
        """Zeros around a map."""
        if not any((*rows, *columns)):
            return x
        return self.emit("pad", Pad(((0, 0), rows, columns)), x)

    def concat(self, names: Sequence[str], axis: int) -> str:
        return names[0] if len(names) == 1 else self.emit("concat", Concat(axis), *names)

    def maxpool(self, x: str, stride: int, padding: tuple[int, int, int, int]) -> str:
        return self.emit("pool", MaxPool(stride, padding), x)

    # -- costs -----------------------------------------------------------------------------------

    @property
    def cycles(self) -> float:
        """What the steps cost by the target's own figures (`archnet.hardware.estimate`)."""
        return sum(estimate(self.steps, self.modules, self.shapes, self.target.costs).values())

    @property
    def misfit(self) -> str:
        """The first reason for which the target does not run the steps; "" where it does."""
        for step in self.steps:
            read = [self.shapes[name] for name in step.inputs]
            module = self.modules[step.name]
            layer = layer_of(module, read, weights=False)
            reason = self.target.judge(layer)[1] if layer is not None else ""
            if not reason and isinstance(module, FullyConnected) and len(read[0]) > 1:
                reason = "" if self.target.fc_per_position else "a layer at every position"
            if reason:
                return reason
        return ""
