"""What many operators have on grids, rounded at once: in few passes instead of a dozen for each.

All weights of one grid are rows of one tensor, all biases one vector, and so are all scales. The
values are the same, and the gradients but for rounding.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from archnet.ops import Activation, Operator, Student, WeightedOperator
from archnet.ops.tables import joined
from archnet.quant.quantizers import (
    BiasQuantizer,
    LearnedStep,
    Quantizer,
    Steps,
    WeightLSQ,
    round_through,
)

ALIGNED = 8  # rows of a multiple of so many weights are cut into pieces of one length
_EXACT = 1e-4  # steps of a grid: what float32 loses between the largest integer and its neighbour


class Together:
    """Rounds the parameters of some operators at once.

    Args:
        operators: of a student, all of which are run: what is not would get a gradient of zeros
            instead of none.
        exact: constants that `exact_constants` found, which are rounded once for all.
    """

    def __init__(
        self, operators: Iterable[Operator], exact: Collection[WeightedOperator] = ()
    ) -> None:
        grids: dict[tuple[int, int, bool], list[WeightedOperator]] = {}
        constants: dict[WeightedOperator, Tensor] = {}
        activations: dict[Quantizer, None] = {}
        for operator in dict.fromkeys(operators):
            if isinstance(operator, Activation) and isinstance(operator.quantizer, Quantizer):
                activations[operator.quantizer] = None
            elif isinstance(operator, WeightedOperator):
                quantizer = operator.weight_quantizer
                # One bit has a rule of its own, and so has DoReFa.
                if operator in exact:
                    constants[operator] = on_grid(operator)
                elif isinstance(quantizer, WeightLSQ) and quantizer.bits > 1:
                    key = (quantizer.low, quantizer.high, _row(operator) % ALIGNED == 0)
                    grids.setdefault(key, []).append(operator)
        self._activations = list(activations)
        self._constants = constants
        self._operators = [*(operator for members in grids.values() for operator in members)]
        self._operators += constants
        self._weights = _Weights(list(grids.values()))
        self._biases = _Biases(
            [
                operator
                for operator in self._operators
                if isinstance(operator.bias_quantizer, BiasQuantizer)
                and _source(operator) in activations
            ]
        )

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Within it operators find their parameters rounded, and quantizers their scales."""
        in_rows = [_quantizer(operator) for operator in self._operators]
        if not self._activations and not in_rows:
            yield
            return
        steps = Steps([*self._activations, *in_rows])
        try:
            for quantizer in self._activations:
                quantizer.entry = steps.entries[quantizer]
            for operator, weight in self._constants.items():
                operator.on_grid["weight"] = weight
            self._weights.round(steps)
            self._biases.round(steps)
            yield
        finally:
            for quantizer in self._activations:
                quantizer.entry = None
            for operator in self._operators:
                operator.on_grid = {}


def on_grid(operator: WeightedOperator) -> Tensor:
    """An operator's weight on its grid, without a gradient."""
    quantizer = _quantizer(operator)
    with torch.no_grad():
        return quantizer.integers(operator.weight) * quantizer.along(operator.weight)


def exact_constants(student: Student) -> set[WeightedOperator]:
    """Constants that their grids hold exactly.

    LSQ's gradient of a scale is the sum of g * (y - x) where nothing is cut off (`LearnedStep`):
    rounding moves none of these weights, so that no training ever moves their scales.
    """
    return {
        operator
        for operator in student.operators.values()
        if isinstance(operator, WeightedOperator)
        and not operator.trainable
        and isinstance(operator.weight_quantizer, WeightLSQ)
        and operator.weight_quantizer.bits > 1
        and bool(_error(operator) < _EXACT)
    }


def _error(operator: WeightedOperator) -> Tensor:
    """How far rounding moves a weight at most, in steps of its grid."""
    weight = operator.weight.detach()
    return ((on_grid(operator) - weight) / _quantizer(operator).along(weight)).detach().abs().max()


class _Weights:
    """Weights, grid by grid cut into pieces of one length, of which each has one scale."""

    def __init__(self, grids: Sequence[Sequence[WeightedOperator]]) -> None:
        self.grids = grids
        self.lengths = [math.gcd(*map(_row, operators)) for operators in grids]
        # Of every piece: where its scale is, and LSQ's factor.
        self._places: list[Tensor] = []
        self._factors: list[Tensor] = []

    def round(self, steps: Steps) -> None:
        if not self._places:
            for operators, length in zip(self.grids, self.lengths, strict=True):
                each = [_pieces(steps, operator, length) for operator in operators]
                self._places.append(torch.cat([places for places, _ in each]))
                self._factors.append(torch.cat([factors for _, factors in each]))
        for kept in (self._places, self._factors):
            kept[:] = [vector.to(steps.scales.device) for vector in kept]
        for operators, length, places, factors in zip(
            self.grids, self.lengths, self._places, self._factors, strict=True
        ):
            _round_grid(steps, operators, length, places, factors)


def _pieces(steps: Steps, operator: WeightedOperator, length: int) -> tuple[Tensor, Tensor]:
    """Places and factors of an operator's pieces of so many weights."""
    quantizer = _quantizer(operator)
    count = operator.weight.numel() // quantizer.channels // length
    places = steps.places(quantizer).repeat_interleave(count)
    factor = quantizer.factor(quantizer.values(operator.weight))
    return places, steps.scales.new_full(places.shape, factor)


def _round_grid(
    steps: Steps,
    operators: Sequence[WeightedOperator],
    length: int,
    places: Tensor,
    factors: Tensor,
) -> None:
    """Round weights of one grid, cut into pieces."""
    flat = [operator.weight.permute(_order(operator.weight)) for operator in operators]
    pieces = joined([weight.reshape(-1) for weight in flat]).view(-1, length)
    grid, scales = _quantizer(operators[0]), steps.scales.index_select(0, places)
    where = steps.logarithms, scales, grid.low, grid.high, steps.left, places, factors
    cuts = LearnedStep.apply(pieces, *where).view(-1).split([weight.numel() for weight in flat])
    for operator, weight, cut in zip(operators, flat, cuts, strict=True):
        order = _order(operator.weight)
        back = [order.index(axis) for axis in range(len(order))]
        operator.on_grid["weight"] = cut.view(weight.shape).permute(back)


class _Biases:
    """Biases in steps of input scale * weight scale."""

    def __init__(self, operators: Sequence[WeightedOperator]) -> None:
        # Those that are trained first: a gradient of the constants would be a pass each.
        self.operators = sorted(operators, key=lambda operator: not operator.trainable)
        self._index: list[Tensor] = []  # of the scales of weights, and of those of inputs

    def round(self, steps: Steps) -> None:
        if not self.operators:
            return
        biases = joined([operator.bias for operator in self.operators])
        if not self._index:
            for of in (_quantizer, _source):
                places = [steps.places(of(o)).expand(len(o.bias)) for o in self.operators]
                self._index.append(torch.cat(places))
        self._index = [index.to(biases.device) for index in self._index]
        weights, inputs = (steps.scales.index_select(0, index) for index in self._index)
        step = weights * inputs
        rounded = round_through(biases / step) * step
        sizes = [len(operator.bias) for operator in self.operators]
        trained = sum(operator.trainable for operator in self.operators)
        if 0 < trained < len(sizes):
            first, rest = rounded.split([sum(sizes[:trained]), sum(sizes[trained:])])
            parts = *first.split(sizes[:trained]), *rest.detach().split(sizes[trained:])
        else:
            parts = rounded.split(sizes)
        for operator, part in zip(self.operators, parts, strict=True):
            operator.on_grid["bias"] = part


def _quantizer(operator: WeightedOperator) -> Quantizer:
    assert isinstance(operator.weight_quantizer, Quantizer)
    return operator.weight_quantizer


def _source(operator: WeightedOperator) -> Quantizer:
    """The quantizer of what a layer reads."""
    assert isinstance(operator.bias_quantizer, BiasQuantizer)
    return operator.bias_quantizer.source


def _row(operator: WeightedOperator) -> int:
    """How many weights have one scale."""
    return operator.weight.numel() // _quantizer(operator).channels


def _order(weight: Tensor) -> list[int]:
    """The axes as they lie in memory, behind that of the outputs."""
    return [0, *sorted(range(1, weight.dim()), key=weight.stride, reverse=True)]
