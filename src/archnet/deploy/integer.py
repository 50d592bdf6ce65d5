"""The student in integers alone: a small explicit form, and the golden model that runs it.

`to_integers` turns a quantized student into an `IntegerModel`, a list of steps that hold nothing
but integers. Its `run` is the reference for every other form: after the input is quantized no float
takes part. Accumulators are int32 in two's complement, requantization happens in int64, and
rounding is half to even, as it is in torch, NumPy and ONNX.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor

from archnet.deploy.writer import ExportError
from archnet.lower import lower
from archnet.ops import (
    NATIVE,
    Activation,
    Add,
    AddConstant,
    AveragePool,
    BatchNorm,
    Concat,
    Convolution,
    FullyConnected,
    LayoutMove,
    MaxPool,
    Mean,
    Operator,
    Pad,
    Permute,
    Reshape,
    Slice,
    Step,
    Student,
    Summing,
    TokenEmbedding,
    WeightedOperator,
)
from archnet.ops.operators import Pair, split
from archnet.quant import BiasQuantizer, Quantizer

Kind = Literal["multiplier", "float", "power_of_two"]
KINDS: tuple[Kind, ...] = ("multiplier", "float", "power_of_two")
Integers = NDArray[np.int32]

MULTIPLIER_BITS = 31
ACCUMULATOR_BITS = 32
OFFSET_BITS = 61  # of what is added to a product of 62 bits
LARGEST_SCALE = 2.0**16  # steps of a grid in a unit of an accumulator; calibration leaves 2^14


@dataclass(frozen=True)
class Requantization:
    """Accumulators to the integers of a grid: clip(round(acc * scale + offset), low, high).

    scale = multiplier * 2^-shift. ``multiplier`` is a signed 31-bit integer (a power of two
    where the kind is ``power_of_two``: a shift is all there is), and the sum is
    (acc * multiplier + offset) >> shift in 64 bits, rounded half to even. Under ``float`` the
    product is taken in float32, as ONNX Runtime's integer kernels take it.

    Args:
        kind: see above.
        scale: (C,) or (1,), float64: value of an accumulator unit over the step of the grid.
        low, high: integer bounds.
        offset: float64, in steps of the grid: (C,), or (1, ...) with an axis for each of the
            accumulators'; zeros but for batch norms and added constants.

    Example (scale 0.3, low 0, high 15): 11 becomes round(3.3) = 3, -4 becomes 0.
    """

    kind: Kind
    scale: NDArray[np.float64]
    low: int
    high: int
    offset: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))

    @property
    def shift(self) -> NDArray[np.int64]:
        """Right shifts, 0 to 62, for which multiplier and offset fit, of the shape of both."""
        exponent = np.frexp(self.scale)[1].astype(np.int64)
        most = np.int64(1 if self.kind == "power_of_two" else MULTIPLIER_BITS) - exponent
        # A norm whose slope is next to nothing: its shift is all there is of it.
        reach = OFFSET_BITS - np.frexp(self.offset)[1].astype(np.int64)
        return np.clip(np.minimum(most, reach), 0, 62)

    @property
    def multiplier(self) -> NDArray[np.int64]:
        """Signed integers below 2^31 in size, as many as there are shifts."""
        return np.rint(np.ldexp(self.scale, self.shift.astype(np.int32))).astype(np.int64)

    @property
    def shifted_offset(self) -> NDArray[np.int64]:
        """What is added before the shift, of its shape."""
        shifted = np.ldexp(self.offset, self.shift.astype(np.int32))
        most = 2.0**OFFSET_BITS  # beyond it the result is an end of the grid
        return np.rint(np.clip(shifted, -most, most)).astype(np.int64)

    def __call__(self, accumulator: NDArray[Any], axis: int) -> Integers:
        """Integers of the grid; the channels of ``accumulator`` lie along ``axis``."""

        def along(constant: NDArray[Any]) -> NDArray[Any]:
            if constant.ndim > 1:
                return constant
            shape = [1] * accumulator.ndim
            shape[axis] = constant.size
            return constant.reshape(shape)

        if self.kind == "float":
            scaled = accumulator.astype(np.float32) * along(self.scale.astype(np.float32))
            level = np.rint(scaled + along(self.offset.astype(np.float32)))
            return np.clip(level, self.low, self.high).astype(np.int32)
        product = accumulator.astype(np.int64) * along(self.multiplier)
        level = _shift_half_even(product + along(self.shifted_offset), along(self.shift))
        return np.clip(level, self.low, self.high).astype(np.int32)


def _shift_half_even(value: NDArray[np.int64], shift: NDArray[np.int64]) -> NDArray[np.int64]:
    """Divide by 2^shift, rounded half to even, in integers."""
    below = value >> shift
    rest = value - (below << shift)
    half = (np.int64(1) << shift) >> 1
    up = (rest > half) | ((rest == half) & (shift > 0) & (below & 1 == 1))
    return below + up


@dataclass(frozen=True)
class IntegerStep:
    """One step: ``operator`` (with its float weights unused) on the values ``inputs``.

    Args:
        name: of the value it writes, as in the student.
        inputs: values it reads.
        operator: says what is done, and with which stride, padding, axis, order.
        origin: the teacher's module path.
        weight: (O, I, kh, kw) or (O, I) integers, for a convolution or a fully connected layer.
        bias: (O,) int32, in accumulator units.
        unit: (O,) or (1,) float64, the value of an accumulator unit. For a step that leaves its
            accumulators as they are, it is what a reader multiplies them by.
        requantization: what follows the accumulation; None for raw accumulators.
        weight_bits: width of the weight.
    """

    name: str
    inputs: tuple[str, ...]
    operator: Operator
    origin: str = ""
    weight: Integers | None = None
    bias: Integers | None = None
    unit: NDArray[np.float64] | None = None
    requantization: Requantization | None = None
    weight_bits: int = 0

    @property
    def axis(self) -> int:
        """The axis of the channels in what the step writes, the batch being axis 0."""
        return -1 if isinstance(self.operator, FullyConnected | TokenEmbedding) else 1


@dataclass(frozen=True)
class IntegerGrid:
    """What the integers of a value mean: value = integer * scale, low <= integer <= high."""

    scale: float
    low: int
    high: int

    @property
    def bits(self) -> int:
        """Width that holds the grid."""
        return (self.high - self.low).bit_length()


@dataclass
class IntegerModel:
    """A network in integers.

    Attributes:
        input: name of the float input, (B, C, H, W).
        outputs: names of the results.
        steps: in order; the first one quantizes the input.
        grids: of every value but raw accumulators.
        shapes: of every value, without the batch.
        aliases: names of the student that mean a value of this model under another name.
    """

    input: str
    outputs: list[str]
    steps: list[IntegerStep]
    grids: dict[str, IntegerGrid]
    shapes: dict[str, tuple[int, ...]]
    aliases: dict[str, str]

    @property
    def entry(self) -> IntegerStep:
        """The step that rounds the input to its grid, where there is one grid for it.

        Raises:
            ExportError: several steps read the input, each on a grid of its own.
        """
        readers = [step for step in self.steps if self.input in step.inputs]
        if len(readers) != 1 or not isinstance(readers[0].operator, Activation):
            names = ", ".join(step.name for step in readers)
            raise ExportError(
                f"this form takes an input with one scale, and {names} read it with different ones"
            )
        return readers[0]

    def run(self, images: NDArray[Any], keep: Sequence[str] = ()) -> dict[str, Integers]:
        """Compute the results, and the values named in ``keep``, in integer arithmetic.

        Args:
            images: (B, C, H, W) floats; they are quantized, and nothing after that is a float.
            keep: further values to return.

        Returns:
            name -> (B, ...) int32; the results are ``outputs``.
        """
        return self.run_on({self.input: np.asarray(images, np.float32)}, keep)

    def run_on(
        self, values: Mapping[str, NDArray[Any]], keep: Sequence[str] = ()
    ) -> dict[str, Integers]:
        """As `run`, of a model with several inputs: by name, token numbers (B, T), and (B, ...)
        integers of the grids that the model has for them.
        """
        wanted = {*self.outputs, *keep}
        last_reader = {name: step.name for step in self.steps for name in step.inputs}
        live = dict(values)
        for step in self.steps:
            live[step.name] = execute(step, [live[name] for name in step.inputs], self)
            for name in set(step.inputs):
                if last_reader[name] == step.name and name not in wanted:
                    del live[name]
        return {name: live[name] for name in wanted}

    def results(self, images: NDArray[Any], batch_size: int = 64) -> list[Integers]:
        """The integers of each result, (B, ...), in the order of ``outputs``."""
        firsts = range(0, len(images), batch_size)
        parts = [self.run(images[first : first + batch_size]) for first in firsts]
        return [np.concatenate([part[name] for part in parts]) for name in self.outputs]

    def unit(self, name: str) -> NDArray[np.float64]:
        """Value of one integer of a result, (1, ...), from the layer behind it."""
        by_name, moves = {step.name: step for step in self.steps}, list[IntegerStep]()
        while name not in self.grids and by_name[name].unit is None:
            moves.append(by_name[name])
            name = by_name[name].inputs[0]
        units = np.ones((1, *self.shapes[name]))
        if name in self.grids:
            units *= self.grids[name].scale
        else:
            source = by_name[name]
            assert source.unit is not None
            units = np.moveaxis(np.moveaxis(units, source.axis, -1) * source.unit, -1, source.axis)
        for move in reversed(moves):
            units = execute(move, [units], self)
        return units

    def accumulators(self) -> dict[str, int]:
        """For every layer the bits of the widest accumulator that any input can bring about."""
        found = {}
        for step in self.steps:
            if isinstance(step.operator, TokenEmbedding):
                found[step.name] = _table_bits(step, step.operator)
            elif step.weight is not None:
                found[step.name] = accumulator_bits(step, self.grids[step.inputs[0]])
            elif isinstance(step.operator, Summing):
                shapes = [self.shapes[name] for name in step.inputs]
                terms = step.operator.terms(shapes) * split(step.operator.factor)[0]
                grid = self.grids[step.inputs[0]]
                worst = max(terms * grid.high, -terms * grid.low - 1, 0)
                found[step.name] = worst.bit_length() + 1
        return found


def accumulator_bits(step: IntegerStep, source: IntegerGrid) -> int:
    """Signed bits that hold every accumulator of a layer, from its weights: the worst case.

    Partial sums count too: whatever their order, they stay between the sum of all negative and
    the sum of all positive products.
    """
    assert step.weight is not None
    assert step.bias is not None
    rows = step.weight.reshape(len(step.weight), -1).astype(np.int64)
    bias = step.bias.astype(np.int64)
    products = np.stack([rows * source.low, rows * source.high])
    highest = products.max(0).clip(min=0).sum(1) + bias.clip(min=0)
    lowest = products.min(0).clip(max=0).sum(1) + bias.clip(max=0)
    worst = max(int(highest.max()), -int(lowest.min()) - 1, 0)
    return worst.bit_length() + 1


def _table_bits(step: IntegerStep, operator: TokenEmbedding) -> int:
    """Signed bits that hold the sum of a token's row and a position's."""
    assert step.weight is not None
    tables = np.split(step.weight.astype(np.int64), [operator.tokens], axis=1)
    highest = sum(int(table.max(initial=0)) for table in tables)
    lowest = sum(int(table.min(initial=0)) for table in tables)
    return max(highest, -lowest - 1, 0).bit_length() + 1


def to_integers(
    student: Student,
    requantization: Kind = "multiplier",
    accumulator: int | None = None,
    target: Any = None,
) -> IntegerModel:
    """A quantized student as integers, as its target runs it.

    Args:
        student: with quantizers on all weights and activations.
        requantization: how accumulators become integers again; see `Requantization`.
        accumulator: bits of the target's accumulator; None: those of this model, 32.
        target: that it is lowered for (`archnet.lower.lower`); None: that which it was made for.

    Raises:
        ExportError: a step is float, grids that meet in a concatenation differ, a scale is no
            power of two where it must be, or an accumulator can overflow (naming the step, the
            width it needs and what to do).
    """
    if requantization not in KINDS:
        raise ExportError(f"requantization={requantization} is not one of {', '.join(KINDS)}")
    return integers_of(lower(student, target).student, requantization, accumulator)


def integers_of(
    student: Student,
    requantization: Kind = "multiplier",
    accumulator: int | None = None,
    given: Mapping[str, IntegerGrid] | None = None,
) -> IntegerModel:
    """As `to_integers`, of a student that is lowered already.

    Args:
        student: of deployed operators.
        requantization, accumulator: as there.
        given: the grids of inputs that are integers already.

    Raises:
        ExportError: as there.
    """
    with torch.no_grad():
        model = _Integers(student, requantization, given or {}).model()
    most = accumulator or ACCUMULATOR_BITS
    origins = {step.name: step.origin for step in student.graph.steps}
    for name, bits in model.accumulators().items():
        if bits > most:
            raise ExportError(
                f"step {name}, from '{origins[name]}' in the teacher: its accumulator can need "
                f"{bits} bits and the target has {most} (hardware.accumulator_bits): "
                "lower quant.weight_bits or quant.act_bits there"
            )
    return model


@dataclass
class _Pending:
    """Accumulators on their way to the activation that rounds them, and the moves between."""

    step: IntegerStep
    moves: list[IntegerStep]


class _Integers:
    """One walk along the student."""

    def __init__(self, student: Student, kind: Kind, given: Mapping[str, IntegerGrid]) -> None:
        self.student, self.kind = student, kind
        self.steps: list[IntegerStep] = []
        self.grids = dict(given)
        self.aliases: dict[str, str] = {}
        self.pending: dict[str, _Pending] = {}
        self.real: set[str] = set()  # values in real numbers

    def model(self) -> IntegerModel:
        graph = self.student.graph
        for step in graph.steps:
            self._add(step, self.student.operator(step.name))
        for name in graph.outputs:
            if name in self.pending:
                self._settle(self.pending.pop(name), None)
        return IntegerModel(
            input=graph.inputs[0],
            outputs=[self._now(name) for name in graph.outputs],
            steps=self.steps,
            grids=self.grids,
            shapes=dict(graph.shapes),
            aliases=self.aliases,
        )

    def _now(self, name: str) -> str:
        return self.aliases.get(name, name)

    def _add(self, step: Step, operator: Operator) -> None:
        source = self._now(step.inputs[0])
        if isinstance(operator, TokenEmbedding):
            self.pending[step.name] = _Pending(self._table(step, operator), [])
        elif isinstance(operator, WeightedOperator):
            self.pending[step.name] = _Pending(self._weighted(step, operator, source), [])
        elif isinstance(operator, BatchNorm):
            self.pending[step.name] = _Pending(self._affine(step, operator, source), [])
        elif isinstance(operator, AddConstant) and not self._is_real(source):
            unit = np.array([self._grid(source, step).scale])
            offset = IntegerStep(step.name, (source,), operator, step.origin, unit=unit)
            self.pending[step.name] = _Pending(offset, [])
        elif isinstance(operator, Summing):
            self.pending[step.name] = _Pending(self._sum(step, operator), [])
        elif isinstance(operator, NATIVE | AddConstant):
            self.pending[step.name] = _Pending(self._native(step, operator), [])
        elif isinstance(operator, Activation):
            self._activation(step, operator, source)
        elif isinstance(operator, LayoutMove) and source in self.pending:
            before = self.pending[source]
            move = IntegerStep(step.name, (source,), operator, step.origin)
            self.pending[step.name] = _Pending(before.step, [*before.moves, move])
        else:
            self._pass_on(step, operator)

    def _weighted(self, step: Step, operator: WeightedOperator, source: str) -> IntegerStep:
        weights, biases = operator.weight_quantizer, operator.bias_quantizer
        if not isinstance(weights, Quantizer) or not isinstance(biases, BiasQuantizer):
            raise ExportError(
                f"step {step.name} ({step.origin}) has float weights: an integer model needs "
                "quant.weight_bits, act_bits, first_bits and last_bits of 8 or less"
            )
        grid = self._grid(source, step)
        said = f"step {step.name}, from '{step.origin}' in the teacher"
        return IntegerStep(
            step.name,
            (source,),
            operator,
            step.origin,
            weight=_integers(f"{said}: its weight", weights.integers(operator.weight)),
            bias=_integers(f"{said}: its bias", biases.integers(operator.bias)),
            unit=_float64(weights.scale) * grid.scale,
            weight_bits=weights.bits,
        )

    def _table(self, step: Step, operator: TokenEmbedding) -> IntegerStep:
        """A look-up: rows of the table are weights, which one-hots would multiply by one."""
        weights = operator.weight_quantizer
        if not isinstance(weights, Quantizer):
            raise ExportError(
                f"step {step.name} ({step.origin}) has float weights: an integer model needs "
                "quant.first_bits of 8 or less"
            )
        self.grids[step.inputs[0]] = IntegerGrid(1.0, 0, 1)  # of one-hots
        return IntegerStep(
            step.name,
            step.inputs,
            operator,
            step.origin,
            weight=_integers(f"step {step.name}: its table", weights.integers(operator.weight)),
            bias=np.zeros(operator.out_features, np.int32),
            unit=_float64(weights.scale),
            weight_bits=weights.bits,
        )

    def _affine(self, step: Step, operator: BatchNorm, source: str) -> IntegerStep:
        """A batch norm is a scale and an offset per channel; its accumulator is its input."""
        grid = self._grid(source, step)
        deviation = np.sqrt(_float64(operator.running_var) + operator.eps)
        slope = _float64(operator.weight) / deviation
        return IntegerStep(step.name, (source,), operator, step.origin, unit=slope * grid.scale)

    def _sum(self, step: Step, operator: Summing) -> IntegerStep:
        """Sums of integers; what they are multiplied by is part of the requantization, but for an
        integer where all scales are powers of two.
        """
        sources = tuple(map(self._now, step.inputs))
        scales = {self._grid(source, step).scale for source in sources}
        if len(scales) > 1:
            raise ExportError(f"step {step.name} adds integers of different scales: {sources}")
        unit = np.array([split(operator.factor)[1] * scales.pop()])
        return IntegerStep(step.name, sources, operator, step.origin, unit=unit)

    def _native(self, step: Step, operator: Operator) -> IntegerStep:
        """What the target computes in its own arithmetic: its meaning, in real numbers.

        A softmax reads the scores of a product as they are, and what is added to them.
        """
        sources = tuple(map(self._now, step.inputs))
        for source in sources:
            if self._is_real(source):
                self._settle(self.pending.pop(source), None)
                self.real.add(source)
            elif source not in self.real:
                self._grid(source, step)
        return IntegerStep(step.name, sources, operator, step.origin, unit=np.ones(1))

    def _is_real(self, source: str) -> bool:
        """Whether a value is computed in real numbers and not rounded yet."""
        before = self.pending.get(source)
        return before is not None and isinstance(before.step.operator, NATIVE | AddConstant)

    def _activation(self, step: Step, operator: Activation, source: str) -> None:
        quantizer = operator.quantizer
        if quantizer is None and operator.low == -math.inf and operator.high == math.inf:
            self.aliases[step.name] = source
            return
        if not isinstance(quantizer, Quantizer):
            raise ExportError(
                f"step {step.name} ({step.origin}) is float: an integer model needs "
                "quant.act_bits, first_bits and last_bits of 8 or less"
            )
        lowest, highest = quantizer.bounds(operator.low, operator.high)
        grid = IntegerGrid(float(quantizer.scale), lowest, highest)
        if source in self.student.graph.inputs:
            self.steps.append(IntegerStep(step.name, (source,), operator, step.origin))
            self.grids[step.name] = grid
        elif source in self.pending:
            self._settle(self.pending.pop(source), grid)
            self.aliases[step.name] = source
        else:
            unit = np.array([self._grid(source, step).scale])
            rescale = self._requantization(step.name, unit / grid.scale, grid)
            self.steps.append(
                IntegerStep(
                    step.name, (source,), operator, step.origin, unit=unit, requantization=rescale
                )
            )
            self.grids[step.name] = grid

    def _requantization(
        self, name: str, scale: NDArray[np.float64], grid: IntegerGrid, **offset: Any
    ) -> Requantization:
        if self.kind == "power_of_two" and (np.abs(np.frexp(scale)[0]) != 0.5).any():
            raise ExportError(
                f"step {name}: its scale is not a power of two, which this target needs: quantize "
                "with hardware.requantization=power_of_two, or for a target with a multiplier"
            )
        if not (np.abs(scale) <= LARGEST_SCALE).all():
            # A product that cancels in integers leaves a rest in floats, of more than a step.
            raise ExportError(
                f"step {name}: its accumulator is requantized by a factor of "
                f"{np.abs(scale).max():.3g}, and the largest possible is {LARGEST_SCALE:.0f}: its "
                "weights are too large for the range of its results in calibration"
            )
        return Requantization(self.kind, scale, grid.low, grid.high, **offset)

    def _settle(self, pending: _Pending, grid: IntegerGrid | None) -> None:
        """Write a layer with its requantization, and the moves that come after it.

        Rounding works element by element, so it goes before the moves, where the channels are.
        """
        step = pending.step
        if grid is not None:
            assert step.unit is not None
            offset: dict[str, Any] = {}
            if isinstance(step.operator, BatchNorm):
                norm = step.operator
                slope = step.unit / self.grids[step.inputs[0]].scale
                shift = _float64(norm.bias) - _float64(norm.running_mean) * slope
                offset["offset"] = shift / grid.scale
            elif isinstance(step.operator, AddConstant):
                offset["offset"] = _float64(step.operator.bias)[None] / grid.scale
            if isinstance(step.operator, NATIVE) or step.inputs[0] in self.real:
                self._append(pending, grid)
                return
            scale = step.unit / grid.scale
            requantization = self._requantization(step.name, scale, grid, **offset)
            step = replace(step, requantization=requantization)
        elif isinstance(step.operator, BatchNorm):
            raise ExportError(f"step {step.name}: a batch norm cannot be the network's result")
        elif isinstance(step.operator, AddConstant):
            step = replace(step, unit=np.ones(1))  # it adds real numbers
        self._append(_Pending(step, pending.moves), grid)

    def _append(self, pending: _Pending, grid: IntegerGrid | None) -> None:
        for part in (pending.step, *pending.moves):
            self.steps.append(part)
            if grid is not None:
                self.grids[part.name] = grid

    def _pass_on(self, step: Step, operator: Operator) -> None:
        """Moves, pooling and concatenation work on the integers as they are."""
        sources = tuple(map(self._now, step.inputs))
        grids = [self._grid(source, step) for source in sources]
        if len({grid.scale for grid in grids}) > 1:
            raise ExportError(
                f"step {step.name} concatenates integers of different scales: {sources}"
            )
        self.steps.append(IntegerStep(step.name, sources, operator, step.origin))
        self.grids[step.name] = IntegerGrid(
            grids[0].scale, min(g.low for g in grids), max(g.high for g in grids)
        )

    def _grid(self, source: str, step: Step) -> IntegerGrid:
        if source not in self.grids:
            raise ExportError(
                f"step {step.name} ({step.origin}) reads {source}, which is not rounded to "
                "integers: an integer model needs quant.act_bits of 8 or less"
            )
        return self.grids[source]


def square(step: IntegerStep) -> tuple[int, int]:
    """Stride and padding of a window that is 1x1, 3x3 or 2x2, dense and as wide as high, as arch5
    has them; of a max-pooling the padding is 0 here.

    Raises:
        ExportError: it is another window.
    """
    operator = step.operator
    assert isinstance(operator, Convolution | MaxPool)
    padding = operator.padding[:2] if isinstance(operator, Convolution) else (0, 0)
    known = [1, 3] if isinstance(operator, Convolution) else [2]
    pairs = (operator.kernel, operator.stride, operator.dilation, padding)
    is_dense = not isinstance(operator, Convolution) or operator.groups == 1
    if (
        any(first != second for first, second in pairs)
        or operator.kernel[0] not in known
        or operator.dilation != (1, 1)
        or not is_dense
    ):
        raise ExportError(
            f"step {step.name}: this form has only windows of {' and '.join(map(str, known))} "
            "pixels: lower the student for arch5, to_integers(student, target='arch5')"
        )
    return operator.stride[0], padding[0]


def execute(step: IntegerStep, inputs: Sequence[NDArray[Any]], model: IntegerModel) -> NDArray[Any]:
    """One step of the golden model."""
    x, operator = inputs[0], step.operator
    is_real = isinstance(operator, AddConstant) and step.requantization is None
    if isinstance(operator, NATIVE) or is_real:
        return _in_real_numbers(step, operator, inputs, model)
    if isinstance(operator, Activation) and step.requantization is None:
        grid = model.grids[step.name]
        level = np.rint(x / np.float32(grid.scale))
        return np.clip(level, grid.low, grid.high).astype(np.int32)
    if isinstance(operator, Convolution):
        x = _convolved(x, operator, step)
    elif isinstance(operator, TokenEmbedding):
        x = _looked_up(inputs, operator, step)
    elif isinstance(operator, FullyConnected):
        x = _accumulate(x, step)
    elif isinstance(operator, Summing):
        x = split(operator.factor)[0] * _summed(inputs, operator)
    elif isinstance(operator, MaxPool):
        x = _max_pool(x, operator, model.grids[step.name].low)
    elif isinstance(operator, Concat):
        x = np.concatenate(inputs, operator.axis)
    elif isinstance(operator, Permute):
        x = np.transpose(x, operator.order)
    elif isinstance(operator, Reshape):
        x = x.reshape(len(x), *operator.shape)
    elif isinstance(operator, Slice):
        x = x[
            (slice(None),) * operator.axis + (slice(operator.start, operator.stop, operator.step),)
        ]
    elif isinstance(operator, Pad):
        x = np.pad(x, ((0, 0), *operator.pads))
    elif isinstance(operator, LayoutMove):
        x = operator(torch.from_numpy(x)).numpy()
    if step.requantization is not None:
        x = step.requantization(x, step.axis)
    return np.ascontiguousarray(x)


def _in_real_numbers(
    step: IntegerStep, operator: Operator, inputs: Sequence[NDArray[Any]], model: IntegerModel
) -> NDArray[Any]:
    """Dequantized, computed in float64, and rounded half to even where the result has a grid."""
    values = [
        torch.from_numpy(x * model.grids[name].scale if name in model.grids else x).double()
        for name, x in zip(step.inputs, inputs, strict=True)
    ]
    with torch.no_grad():
        result = np.asarray(copy.deepcopy(operator).double()(*values).numpy())
    if step.name not in model.grids:
        return result
    grid = model.grids[step.name]
    return np.clip(np.rint(result / grid.scale), grid.low, grid.high).astype(np.int32)


def _windows(x: Integers, kernel: Pair, stride: Pair, dilation: Pair = (1, 1)) -> NDArray[np.int32]:
    """(B, C, H, W) to (B, C, H', W', kh, kw): what each output position sees."""
    extent = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    windows = sliding_window_view(x, extent, (2, 3))
    (sy, sx), (dy, dx) = stride, dilation
    return windows[:, :, ::sy, ::sx, ::dy, ::dx]


def _padded(x: Integers, padding: Pair) -> Integers:
    (py, px) = padding
    return np.pad(x, ((0, 0), (0, 0), (py, py), (px, px)))


def _convolved(x: Integers, operator: Convolution, step: IntegerStep) -> Integers:
    """Sums of products over windows, group by group, in int32: (B, O, H', W')."""
    assert step.weight is not None
    assert step.bias is not None
    if operator.groups > 1 and operator.copies > 1:
        batch, _, height, width = x.shape
        parted = x.reshape(batch, operator.copies, operator.groups, -1, height, width)
        x = parted.swapaxes(1, 2).reshape(x.shape)
    windows = _windows(
        _padded(x, operator.padding), operator.kernel, operator.stride, operator.dilation
    )
    weights = np.split(step.weight, operator.groups)
    sums = []
    for part, weight in zip(np.split(windows, operator.groups, 1), weights, strict=True):
        batch, _, height, width = part.shape[:4]
        rows = part.transpose(0, 2, 3, 1, 4, 5).reshape(batch, height, width, -1)
        sums.append(rows @ weight.reshape(len(weight), -1).T)
    return np.moveaxis(np.concatenate(sums, -1) + step.bias, -1, 1)


def _looked_up(
    inputs: Sequence[NDArray[Any]], operator: TokenEmbedding, step: IntegerStep
) -> Integers:
    """The rows of tokens and positions, added; positions start at 0 where none is given."""
    assert step.weight is not None
    tokens, *first = inputs
    places = np.arange(tokens.shape[1])[None] + (first[0] if first else 0)
    found: Integers = step.weight.T[tokens] + step.weight.T[operator.tokens + places]
    return found


def _accumulate(x: Integers, step: IntegerStep) -> Integers:
    """Sums of products over the last axis.

    They fit 32 bits, and so float64, whose products are computed faster, has them exactly.
    """
    assert step.weight is not None
    assert step.bias is not None
    sums = x.astype(np.float64) @ step.weight.T.astype(np.float64)
    return sums.astype(np.int64).astype(np.int32) + step.bias


def _summed(inputs: Sequence[Integers], operator: Summing) -> Integers:
    """Sums without their factor."""
    if isinstance(operator, Add):
        return np.sum(np.stack(inputs), 0, dtype=np.int32)
    if isinstance(operator, AveragePool):
        windows = _windows(_padded(inputs[0], operator.padding), operator.kernel, operator.stride)
        return windows.sum((-2, -1), dtype=np.int32)
    assert isinstance(operator, Mean)
    return np.asarray(inputs[0].sum(operator.axes, dtype=np.int32))


def _max_pool(x: Integers, operator: MaxPool, lowest: int) -> Integers:
    left, right, top, bottom = operator.padding
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=lowest)
    windows = _windows(padded, operator.kernel, operator.stride, operator.dilation)
    return np.maximum.reduce(windows, axis=(-2, -1))


def _integers(name: str, values: Tensor) -> Integers:
    """Float integers as int32; no value may be lost."""
    array = values.detach().cpu().double().numpy()
    if not np.isfinite(array).all() or np.abs(array).max(initial=0) > 2**31 - 1:
        raise ExportError(
            f"{name} does not fit 32 bits: it is too large for the scales of weights and input"
        )
    return array.astype(np.int32)


def _float64(values: Tensor) -> NDArray[np.float64]:
    return values.detach().cpu().double().numpy()
