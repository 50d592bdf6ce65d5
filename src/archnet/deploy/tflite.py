"""The integer model as an int8 TensorFlow Lite file, written table by table: nothing is traced.

Every tensor lies as the format wants it, (B, H, W, C), and the batch is 1, as on a chip. Most of a
student's permutations bring channels to the end for a fully connected layer; they cancel here,
and that layer is a 1x1 convolution.

Integers of a grid are stored as int8, moved so that the highest one is 127. An operator saturates
there by itself, and a fused ReLU cuts at 0, so that 4-bit activations clip without an operator of
their own. Only a signed grid below 8 bits takes a MAXIMUM. Weights of any width are int8; narrow
ones stand there times a constant, which compilers pack as well and kernels round more exactly.
Accumulators that are the network's result become int16, whose step needs no calibration.

Numbers of tables, fields, operators and types are those of TensorFlow's ``schema.fbs``, version 3.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import flatbuffers
import numpy as np
from numpy.typing import NDArray

from archnet.deploy.integer import IntegerModel, Integers, IntegerStep, Requantization, square
from archnet.deploy.sentences import Sentences, embedding_of, require_integers
from archnet.deploy.writer import ExportError, Transpose, Value
from archnet.deploy.writer import Reshape as PendingReshape
from archnet.ops import (
    Activation,
    BatchNorm,
    Concat,
    Convolution,
    FullyConnected,
    MaxPool,
    Pad,
    Permute,
    Reshape,
    Slice,
    Stepwise,
    TokenEmbedding,
)

SAME, VALID = np.int8(0), np.int8(1)
LINEAR, RELU = np.int8(0), np.int8(1)
HIGHEST = 127  # of int8
ONE = 64  # the integer of a factor of 1: a power of two, so that its step is exact

# Name: number, version that knows int8, number of its options.
_OPERATORS = {
    "ADD": (0, 2, 11),
    "CONCATENATION": (2, 2, 10),
    "CONV_2D": (3, 3, 1),
    "DEPTHWISE_CONV_2D": (4, 3, 2),
    "MAX_POOL_2D": (17, 2, 5),
    "MUL": (18, 2, 21),
    "RESHAPE": (22, 1, 17),
    "PAD": (34, 2, 22),
    "TRANSPOSE": (39, 2, 26),
    "STRIDED_SLICE": (45, 2, 32),
    "MAXIMUM": (55, 2, 39),
    "MINIMUM": (57, 2, 39),
    "PADV2": (60, 2, 43),
    "QUANTIZE": (114, 2, 89),
}
_TYPES = {"int32": 2, "int64": 4, "int16": 7, "int8": 9}
_SCALARS = {"int8": "Int8", "uint8": "Uint8", "int32": "Int32", "uint32": "Uint32"}
_CHANNELS_LAST, _CHANNELS_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)

# A table of a flatbuffer: its fields by number. A NumPy scalar is a scalar, an array a vector.
Table = Mapping[int, Any]


def to_tflite(model: IntegerModel) -> bytes:
    """A TensorFlow Lite file that computes what `IntegerModel.run` computes.

    Its input is the integers of the first grid, int8, (1, H, W, C); its output has the student's
    shape, with a batch of 1. Scale and zero point of both stand in the file, as does the highest
    integer, which is stored as 127.

    A batch norm is a depthwise convolution, whose offset is rounded to a hundredth of its slope or
    finer, so that it gives these integers but for a few next to a border. For the rest, all
    depends on how a runtime rounds accumulators. Kernels that round once (XNNPACK's) give these
    integers where scales are settled (`archnet.quant.settle`). TensorFlow Lite's own round twice,
    as chips may that do as they do: one activation in ten thousand is then another behind 8-bit
    weights, and layers after it carry that on.

    Args:
        model: from `to_integers`, with any requantization.

    Returns:
        The file's content.

    Raises:
        ExportError: the input is read on several grids, or integers fit no byte.
    """
    return _Emitter(model).content()


def translator_to_tflite(parts: Stepwise, length: int) -> tuple[bytes, bytes]:
    """The encoder and the decoder's step of a translator without attention, as two files.

    Token numbers are one-hots there, (1, T, tokens + positions) with two ones a position, which a
    layer multiplies. The encoder reads ``source`` and gives the memory. The decoder reads
    ``target``, the memory with its last position repeated up to its columns, and the states, and
    gives scores and the next states. Sizes are fixed: the encoder reads sentences of ``length``
    tokens, the end mark included, and no others; each other length has a file of its own.

    Args:
        parts: of a quantized student.
        length: see above.

    Raises:
        ExportError: the student computes something in its target's own arithmetic, integers fit
            no byte, or it knows no sentence as long.
    """
    embedding = embedding_of(parts.encoder)
    if not 1 <= length <= embedding.positions:
        raise ExportError(
            f"length={length}: the student reads sentences of 1 to {embedding.positions} tokens"
        )
    sentences = Sentences.of(parts, "arch5", length=length, fixed=True)
    require_integers(sentences, "tflite")
    encoder, decoder = sentences.integers()
    width = embedding.tokens + embedding.positions
    shapes = decoder.shapes
    reads = {name: shapes[name] for name in (*sentences.parts.memory, *sentences.states)}
    return (
        _Emitter(encoder, {"source": (length, width)}).content(),
        _Emitter(decoder, {"target": (1, width), **reads}).content(),
    )


@dataclass(frozen=True, eq=False)
class Quantized:
    """What the integers of a tensor mean: value = (integer - zero) * scale.

    ``scale`` is (1,), or (C,) for channels along ``axis``; ``dtype`` that of the integers.
    """

    scale: NDArray[np.float64]
    zero: int = 0
    axis: int = 0
    dtype: Any = np.int8


@dataclass(frozen=True, eq=False)
class _Tensor:
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    quantized: Quantized | None
    data: NDArray[Any] | None = None


class TfliteFile:
    """A TensorFlow Lite model that grows operator by operator; tensors are known by name."""

    def __init__(self) -> None:
        self.tensors: dict[str, _Tensor] = {}
        self.operators: list[tuple[str, int, list[str], str, Table]] = []

    def tensor(self, name: str, shape: Sequence[int], quantized: Quantized) -> str:
        """Declare a value."""
        self.tensors[name] = _Tensor(tuple(shape), np.dtype(quantized.dtype), quantized)
        return name

    def constant(self, name: str, data: NDArray[Any], quantized: Quantized | None = None) -> str:
        """Store an array as it is."""
        self.tensors[name] = _Tensor(data.shape, data.dtype, quantized, data)
        return name

    def operator(
        self,
        code: str,
        inputs: Sequence[str],
        output: str,
        options: Table | None = None,
        version: int = 0,
    ) -> str:
        """Write ``output``, a declared tensor; version 0 is the one that knows int8."""
        row = (code, version or _OPERATORS[code][1], list(inputs), output, options or {})
        self.operators.append(row)
        return output

    def content(self, inputs: Sequence[str], outputs: Sequence[str]) -> bytes:
        """The file."""
        index = {name: np.int32(place) for place, name in enumerate(self.tensors)}
        codes = list(dict.fromkeys(row[:2] for row in self.operators))

        def places(names: Sequence[str]) -> NDArray[np.int32]:
            return np.array([index[name] for name in names], np.int32)

        # The first buffer is empty by convention: that of every tensor without data.
        buffers: list[Table] = [{}]
        tensors: list[Table] = []
        for name, tensor in self.tensors.items():
            place = np.uint32(0)
            if tensor.data is not None:
                place = np.uint32(len(buffers))
                buffers.append({0: np.frombuffer(tensor.data.tobytes(), np.uint8)})
            fields = {
                0: np.array(tensor.shape, np.int32),
                1: np.int8(_TYPES[tensor.dtype.name]),
                2: place,
                3: name,
            }
            if tensor.quantized is not None:
                scale = tensor.quantized.scale.astype(np.float32)
                fields[4] = {
                    2: scale,
                    3: np.full(len(scale), tensor.quantized.zero, np.int64),
                    6: np.int32(tensor.quantized.axis),
                }
            tensors.append(fields)
        operators = [
            {
                0: np.uint32(codes.index((code, version))),
                1: places(sources),
                2: places([output]),
                3: np.uint8(_OPERATORS[code][2]),
                4: options,
            }
            for code, version, sources, output, options in self.operators
        ]
        graph = {0: tensors, 1: places(inputs), 2: places(outputs), 3: operators, 4: "student"}
        root = {
            0: np.uint32(3),
            1: [
                {
                    0: np.int8(_OPERATORS[code][0]),
                    2: np.int32(version),
                    3: np.int32(_OPERATORS[code][0]),
                }
                for code, version in codes
            ],
            2: [graph],
            3: "archnet",
            4: buffers,
        }
        builder = flatbuffers.Builder(1024)
        builder.Finish(_write(builder, root), b"TFL3")
        return bytes(builder.Output())


def _write(builder: Any, value: Any) -> int:
    """Write a string, a vector or a table, and what it refers to before it; its offset."""
    if isinstance(value, str):
        return builder.CreateString(value)
    if isinstance(value, np.ndarray):
        if value.dtype == np.uint8:
            builder.Prep(16, value.nbytes)  # Runtimes map data, and want it aligned.
        return builder.CreateNumpyVector(value)
    if isinstance(value, list):
        offsets = [_write(builder, table) for table in value]
        builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            builder.PrependUOffsetTRelative(offset)
        return builder.EndVector()
    fields = {
        number: field if isinstance(field, np.generic) else _write(builder, field)
        for number, field in value.items()
    }
    builder.StartObject(max(fields, default=-1) + 1)
    for number, field in fields.items():
        if isinstance(field, np.generic):
            # Without a default to compare with, a field is always written.
            kind = _SCALARS[field.dtype.name]
            getattr(builder, f"Prepend{kind}Slot")(number, field.item(), None)
        else:
            builder.PrependUOffsetTRelativeSlot(number, field, 0)
    return builder.EndObject()


def convolution_options(padding: np.int8, stride: int, activation: np.int8) -> Table:
    """Options of CONV_2D."""
    return {0: padding, 1: np.int32(stride), 2: np.int32(stride), 3: activation}


def pooling_options(padding: np.int8, strides: tuple[int, int], window: int) -> Table:
    """Options of MAX_POOL_2D with square windows; strides are (height, width)."""
    height, width = strides
    steps = {1: np.int32(width), 2: np.int32(height), 3: np.int32(window), 4: np.int32(window)}
    return {0: padding, **steps, 5: LINEAR}


class _Emitter:
    """One walk along the steps.

    Args:
        model: what is written.
        given: the shapes of inputs that are integers already, without the batch; None: there is
            one, of floats.
    """

    def __init__(
        self, model: IntegerModel, given: Mapping[str, tuple[int, ...]] | None = None
    ) -> None:
        self.model, self.given = model, given
        self.file = TfliteFile()
        self.values: dict[str, Value] = {}
        self.moved: dict[tuple[str, tuple[Transpose | PendingReshape, ...]], str] = {}
        self.entry = model.entry if given is None else None
        self.zeros = self._zeros()

    def content(self) -> bytes:
        for name, shape in (self.given or {}).items():
            tensor = self.file.tensor(name, (1, *shape), self._quantized(name))
            self.values[name] = Value(name, tensor, (1, *shape))
        for step in self.model.steps:
            self.values[step.name] = self._value(step)
        results = [self._tensor(self.values[name]) for name in self.model.outputs]
        inputs = [self.model.input] if self.given is None else list(self.given)
        return self.file.content(inputs, results)

    # What stands where ------------------------------------------------------------------------

    def _zeros(self) -> dict[str, int]:
        """The stored integer that means 0, for every value on a grid.

        Moves, pooling and concatenation take integers as they are, so all that they join share
        it.
        """
        roots = {name: name for name in self.model.grids}

        def root(name: str) -> str:
            while roots[name] != name:
                name = roots[name]
            return name

        for step in self.model.steps:
            if step is not self.entry and step.requantization is None and step.name in roots:
                for source in step.inputs:
                    roots[root(source)] = root(step.name)
        highest: dict[str, int] = {}
        for name, grid in self.model.grids.items():
            highest[root(name)] = max(grid.high, highest.get(root(name), grid.high))
        zeros = {name: HIGHEST - highest[root(name)] for name in roots}
        for name, grid in self.model.grids.items():
            if grid.low + zeros[name] < -HIGHEST - 1:
                raise ExportError(
                    f"step {name}: its integers {grid.low} to {grid.high}, or others that share "
                    "their scale, do not fit a byte: lower quant.act_bits to 8 or less"
                )
        return zeros

    def _quantized(self, name: str) -> Quantized:
        grid = self.model.grids[name]
        return Quantized(np.array([grid.scale]), self.zeros[name])

    def _like(self, source: str, name: str, shape: Sequence[int]) -> str:
        """Declare a tensor whose integers mean what those of ``source`` mean."""
        quantized = self.file.tensors[source].quantized
        assert quantized is not None
        return self.file.tensor(name, shape, quantized)

    def _shape(self, tensor: str) -> tuple[int, ...]:
        return self.file.tensors[tensor].shape

    # Moves ------------------------------------------------------------------------------------

    def _tensor(self, value: Value) -> str:
        """The tensor of a value, with its moves made."""
        tensor, made = value.tensor, list[Transpose | PendingReshape]()
        moves = _simplified(value)
        for move in moves:
            made.append(move)
            key = (value.tensor, tuple(made))
            if key not in self.moved:
                self.moved[key] = self._move(tensor, move, self._fresh(value.name))
            tensor = self.moved[key]
        return tensor

    def _fresh(self, name: str) -> str:
        """A name that no tensor has."""
        names = (f"{name}.{count}" if count else name for count in itertools.count())
        return next(name for name in names if name not in self.file.tensors)

    def _move(self, tensor: str, move: Transpose | PendingReshape, name: str) -> str:
        shape = self._shape(tensor)
        if isinstance(move, PendingReshape):
            after = np.array(move.shape, np.int32)
            self._like(tensor, name, move.shape)
            to = self.file.constant(f"{name}.shape", after)
            return self.file.operator("RESHAPE", [tensor, to], name, {0: after})
        self._like(tensor, name, [shape[axis] for axis in move.order])
        order = self.file.constant(f"{name}.order", np.array(move.order, np.int32))
        return self.file.operator("TRANSPOSE", [tensor, order], name)

    def _laid_out(self, value: Value) -> tuple[Value, tuple[int, ...]]:
        """A value whose only move is a permutation of its axes, and that permutation."""
        if not value.moves:
            return value, tuple(range(len(value.shape)))
        if len(value.moves) == 1 and isinstance(value.moves[0], Transpose):
            return value, value.moves[0].order
        tensor = self._tensor(value)
        shape = value.moved_shape
        return Value(value.name, tensor, shape), tuple(range(len(shape)))

    def _padded(self, tensor: str, name: str, pads: Sequence[tuple[int, int]], fill: int) -> str:
        """Pad with a stored integer; ``pads`` lists every axis, the batch too."""
        shape = [size + sum(pair) for size, pair in zip(self._shape(tensor), pads, strict=True)]
        self._like(tensor, name, shape)
        inputs = [tensor, self.file.constant(f"{name}.pads", np.array(pads, np.int32))]
        quantized = self.file.tensors[tensor].quantized
        assert quantized is not None
        if fill == quantized.zero:
            return self.file.operator("PAD", inputs, name)
        value = np.array([fill], quantized.dtype)
        inputs.append(self.file.constant(f"{name}.fill", value, quantized))
        return self.file.operator("PADV2", inputs, name)

    # Steps ------------------------------------------------------------------------------------

    def _value(self, step: IntegerStep) -> Value:
        if step is self.entry:
            return self._input(step)
        source, operator = self.values[step.inputs[0]], step.operator
        if isinstance(operator, Convolution):
            return self._convolution(step, operator, source)
        if isinstance(operator, FullyConnected | TokenEmbedding):
            return self._fully_connected(step, source)
        if isinstance(operator, BatchNorm):
            return self._batch_norm(step, operator, source)
        if isinstance(operator, Activation):
            return self._rescaled(step, source)
        if isinstance(operator, MaxPool):
            return self._max_pool(step, operator, source)
        if isinstance(operator, Concat):
            return self._concat(step, operator, [self.values[name] for name in step.inputs])
        if isinstance(operator, Permute):
            return source.transposed(operator.order, step.name)
        if isinstance(operator, Reshape):
            return source.reshaped(self._result(step), step.name)
        if isinstance(operator, Slice):
            return self._slice(step, operator, source)
        assert isinstance(operator, Pad)
        return self._pad(step, operator, source)

    def _result(self, step: IntegerStep) -> tuple[int, ...]:
        """The shape that the student has there, with the batch."""
        return (1, *self.model.shapes[step.name])

    def _input(self, step: IntegerStep) -> Value:
        shape = self._result(step)
        name, quantized = self.model.input, self._quantized(step.name)
        if len(shape) != 4:
            return Value(step.name, self.file.tensor(name, shape, quantized), shape)
        stored = tuple(shape[axis] for axis in _CHANNELS_LAST)
        tensor = self.file.tensor(name, stored, quantized)
        return Value(step.name, tensor, stored).transposed(_CHANNELS_FIRST, step.name)

    def _convolution(self, step: IntegerStep, operator: Convolution, source: Value) -> Value:
        assert step.weight is not None
        x = self._tensor(source.transposed(_CHANNELS_LAST, f"{source.name}.last"))
        channels, height, width = self.model.shapes[step.name]
        stride, margin = square(step)
        pads = ((margin,) * 2,) * 2
        zero, kernel = self.zeros[step.inputs[0]], operator.kernel[0]
        x, padding = self._window(step.name, x, kernel, stride, pads, (height, width), zero)
        tensor = self._weighted(
            step, x, step.weight.transpose(0, 2, 3, 1), padding, stride, (height, width)
        )
        shape = (1, height, width, channels)
        return Value(step.name, tensor, shape).transposed(_CHANNELS_FIRST, step.name)

    def _fully_connected(self, step: IntegerStep, source: Value) -> Value:
        assert step.weight is not None
        shape, weight = source.moved_shape, step.weight
        if len(shape) == 2:
            # The moves that flatten a map are made on the weights instead.
            stored = _moved(np.arange(math.prod(shape)).reshape(source.shape), source.moves)
            weight = np.empty_like(weight)
            weight[:, stored.reshape(-1)] = step.weight
            source = Value(source.name, source.tensor, source.shape)
        *places, features = shape[1:]
        height = places[0] if len(places) > 1 else 1
        width = math.prod(places) // height
        x = self._tensor(source.reshaped((1, height, width, features), f"{source.name}.flat"))
        tensor = self._weighted(step, x, weight[:, None, None], VALID, 1, (height, width))
        return Value(step.name, tensor, (1, height, width, len(weight))).reshaped(
            self._result(step), step.name
        )

    def _weighted(
        self,
        step: IntegerStep,
        x: str,
        weight_OHWI: Integers,
        padding: np.int8,
        stride: int,
        size: tuple[int, int],
    ) -> str:
        """CONV_2D on the tensor ``x``: the name of what it writes, (1, *size, O)."""
        assert step.bias is not None
        assert step.unit is not None
        source, name = step.inputs[0], step.name
        bits = self.model.accumulators()[name]
        factor = _headroom(weight_OHWI, bits)
        bias, units = step.bias * factor, step.unit / factor
        shape = (1, *size, len(bias))
        weights = Quantized(units / self.model.grids[source].scale)
        weight = self.file.constant(
            f"{name}.weight", (weight_OHWI * factor).astype(np.int8), weights
        )
        if step.requantization is not None:
            biases = self.file.constant(f"{name}.bias", bias, Quantized(units, dtype=np.int32))
            return self._clipped(
                step,
                shape,
                lambda output, activation: self.file.operator(
                    "CONV_2D",
                    [x, weight, biases],
                    output,
                    convolution_options(padding, stride, activation),
                ),
            )
        wide = self._widened(x, source)
        # Powers of two keep accumulators exact where all channels share one unit.
        result = Quantized(step.unit.max(keepdims=True) * 2.0 ** (bits - 16), dtype=np.int16)
        self.file.tensor(name, shape, result)
        biases = self.file.constant(f"{name}.bias", bias, Quantized(units, dtype=np.int32))
        # Biases of 32 bits are said: they are 64 by default here, with which Vela crashes for U85.
        options = {**convolution_options(padding, stride, LINEAR), 6: np.int8(_TYPES["int32"])}
        return self.file.operator("CONV_2D", [wide, weight, biases], name, options, version=8)

    def _widened(self, x: str, source: str) -> str:
        """The same integers as int16, whose zero point is 0."""
        wide = Quantized(np.array([self.model.grids[source].scale]), dtype=np.int16)
        name = self.file.tensor(f"{x}.wide", self._shape(x), wide)
        return self.file.operator("QUANTIZE", [x], name)

    def _clipped(
        self,
        step: IntegerStep,
        shape: tuple[int, ...],
        write: Callable[[str, np.int8], str],
        fuses: bool = True,
    ) -> str:
        """``write(output, activation)`` an operator that rounds, and clip to the step's grid.

        Operators saturate at both ends of int8; those that ``fuses`` is true of also cut at 0.
        """
        requantization, quantized = step.requantization, self._quantized(step.name)
        assert requantization is not None
        low = requantization.low + quantized.zero
        high = requantization.high + quantized.zero
        cuts = low > -HIGHEST - 1
        activation = RELU if cuts and fuses and requantization.low == 0 else LINEAR
        clips = []
        if cuts and activation == LINEAR:
            clips.append(("MAXIMUM", low))
        if high < HIGHEST:
            clips.append(("MINIMUM", high))
        names = [f"{step.name}.unclipped{count}" for count in range(len(clips))] + [step.name]
        for name in names:
            self.file.tensor(name, shape, quantized)
        write(names[0], activation)
        for (code, bound), before, name in zip(clips, names, names[1:], strict=False):
            bounds = np.array([bound], np.int8)
            limit = self.file.constant(f"{name}.{code.lower()}", bounds, quantized)
            self.file.operator(code, [before, limit], name)
        return step.name

    def _batch_norm(self, step: IntegerStep, operator: BatchNorm, source: Value) -> Value:
        """A depthwise 1x1 convolution."""
        requantization = step.requantization
        assert requantization is not None
        rank = len(source.moved_shape)
        last = (0, *range(2, rank), 1)
        back = tuple(int(axis) for axis in np.argsort(last))
        source = source.transposed(last, f"{source.name}.last")
        *places, channels = source.moved_shape[1:]
        height = places[0] if len(places) > 1 else 1
        shape = (1, height, math.prod(places) // height, channels)
        x = self._tensor(source.reshaped(shape, f"{source.name}.flat"))

        name = step.name
        grid, target = self.model.grids[step.inputs[0]], self.model.grids[name]
        weight, bias, unit = affine(requantization, np.arange(grid.low, grid.high + 1))
        weights = Quantized(unit * target.scale / grid.scale, axis=3)
        biases = Quantized(unit * target.scale, dtype=np.int32)
        constants = [
            self.file.constant(f"{name}.weight", weight[None, None, None], weights),
            self.file.constant(f"{name}.bias", bias, biases),
        ]
        one = np.int32(1)
        tensor = self._clipped(
            step,
            shape,
            lambda output, activation: self.file.operator(
                "DEPTHWISE_CONV_2D",
                [x, *constants],
                output,
                {0: VALID, 1: one, 2: one, 3: one, 4: activation},
            ),
        )
        value = Value(name, tensor, shape).reshaped(source.moved_shape, name)
        return value.transposed(back, name)

    def _rescaled(self, step: IntegerStep, source: Value) -> Value:
        """Integers of another grid: a product with one. It works element by element, so it goes
        before the pending moves.

        Not a QUANTIZE: XNNPACK's multiplies by eight bits alone, and rounds some values elsewhere.
        """
        one = np.array([ONE], np.int8)
        factor = self.file.constant(f"{step.name}.one", one, Quantized(np.array([1 / ONE])))
        tensor = self._clipped(
            step,
            source.shape,
            lambda output, activation: self.file.operator(
                "MUL", [source.tensor, factor], output, {0: activation}
            ),
        )
        return replace(source, name=step.name, tensor=tensor)

    def _window(
        self,
        name: str,
        x: str,
        kernel: int,
        stride: int,
        pads: Sequence[tuple[int, int]],
        results: tuple[int, int],
        fill: int,
    ) -> tuple[str, np.int8]:
        """What a convolution or pooling reads, and how it pads that itself.

        SAME centres the windows; with a stride they then begin elsewhere than ours, and a PAD
        says where.
        """
        used, same = [], []
        for size, (before, _), result in zip(self._shape(x)[1:3], pads, results, strict=True):
            used.append((before, max(0, (result - 1) * stride + kernel - size - before)))
            total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
            same.append((total // 2, total - total // 2))
        if not any(map(any, used)):
            return x, VALID
        if used == same:
            return x, SAME
        return self._padded(x, f"{name}.pad", [(0, 0), *used, (0, 0)], fill), VALID

    def _max_pool(self, step: IntegerStep, operator: MaxPool, source: Value) -> Value:
        x = self._tensor(source.transposed(_CHANNELS_LAST, f"{source.name}.last"))
        channels, height, width = self.model.shapes[step.name]
        stride, _ = square(step)
        left, right, top, bottom = operator.padding
        lowest = self.model.grids[step.name].low + self.zeros[step.name]
        x, padding = self._window(
            step.name,
            x,
            2,
            stride,
            ((top, bottom), (left, right)),
            (height, width),
            lowest,
        )
        shape = (1, height, width, channels)
        tensor = self.file.operator(
            "MAX_POOL_2D",
            [x],
            self.file.tensor(step.name, shape, self._quantized(step.name)),
            pooling_options(padding, (stride, stride), 2),
        )
        return Value(step.name, tensor, shape).transposed(_CHANNELS_FIRST, step.name)

    def _concat(self, step: IntegerStep, operator: Concat, sources: list[Value]) -> Value:
        shape, axis = self._result(step), operator.axis
        if len(shape) > 4:
            # Chips know four axes; those behind the joined one can be one with it.
            stored: tuple[int, ...] = _four(shape, axis)
            flat = [
                source.reshaped(_four(source.moved_shape, axis), f"{source.name}.flat")
                for source in sources
            ]
            tensor = self._joined(step.name, flat, stored, 3)
            return Value(step.name, tensor, stored).reshaped(shape, step.name)
        _, order = self._laid_out(sources[0])
        undo = tuple(int(axis) for axis in np.argsort(order))
        stored = tuple(shape[axis] for axis in undo)
        alike = [source.transposed(undo, f"{source.name}.alike") for source in sources]
        tensor = self._joined(step.name, alike, stored, order[axis])
        return Value(step.name, tensor, stored).transposed(order, step.name)

    def _joined(
        self, name: str, sources: Sequence[Value], shape: tuple[int, ...], axis: int
    ) -> str:
        tensors = [self._tensor(source) for source in sources]
        self.file.tensor(name, shape, self._quantized(name))
        return self.file.operator("CONCATENATION", tensors, name, {0: np.int32(axis), 1: LINEAR})

    def _slice(self, step: IntegerStep, operator: Slice, source: Value) -> Value:
        source, order = self._laid_out(source)
        shape, place = self._shape(source.tensor), order[operator.axis]
        wanted = range(*slice(operator.start, operator.stop, operator.step).indices(shape[place]))
        cut = Value(f"{source.name}.laid", source.tensor, shape)
        if wanted != range(0, shape[place], wanted.step):
            name = step.name if wanted.step == 1 else f"{step.name}.cut"
            cut = self._cut(name, cut, place, wanted.start, wanted[-1] + 1)
        if wanted.step > 1:
            cut = self._every(step.name, cut, place, wanted.step)
        return replace(cut.transposed(order, step.name), name=step.name)

    def _cut(self, name: str, source: Value, place: int, start: int, stop: int) -> Value:
        """What lies from ``start`` to ``stop`` along an axis."""
        begin, end = [0] * len(source.shape), list(source.shape)
        begin[place], end[place] = start, stop
        shape = tuple(last - first for first, last in zip(begin, end, strict=True))
        self._like(source.tensor, name, shape)
        constants = [
            self.file.constant(f"{name}.{key}", np.array(values, np.int32))
            for key, values in (("begin", begin), ("end", end), ("stride", [1] * len(begin)))
        ]
        self.file.operator("STRIDED_SLICE", [source.tensor, *constants], name)
        return Value(name, name, shape)

    def _every(self, name: str, source: Value, place: int, step: int) -> Value:
        """The first of every ``step`` places along an axis: the largest of one number.

        Vela leaves a STRIDED_SLICE with another stride than 1 to the CPU for Ethos-U55.
        """
        shape = list(source.shape)
        wide = source
        if len(shape) != 4 or place not in (1, 2):
            ahead, behind = math.prod(shape[:place]), math.prod(shape[place + 1 :])
            wide = source.reshaped((1, ahead, shape[place], behind), f"{name}.wide")
        x = self._tensor(wide)
        shape[place] = -(-shape[place] // step)
        stored, strides = list(self._shape(x)), [1, 1]
        axis = place if wide is source else 2
        stored[axis], strides[axis - 1] = shape[place], step
        tensor = f"{name}.every" if wide is not source else name
        self._like(x, tensor, stored)
        options = pooling_options(VALID, (strides[0], strides[1]), 1)
        self.file.operator("MAX_POOL_2D", [x], tensor, options)
        return Value(name, tensor, tuple(stored)).reshaped(tuple(shape), name)

    def _pad(self, step: IntegerStep, operator: Pad, source: Value) -> Value:
        source, order = self._laid_out(source)
        pads = [(0, 0), *operator.pads]
        undo = np.argsort(order)
        quantized = self.file.tensors[source.tensor].quantized
        assert quantized is not None
        self._padded(source.tensor, step.name, [pads[axis] for axis in undo], quantized.zero)
        shape = self._shape(step.name)
        return Value(step.name, step.name, shape).transposed(order, step.name)


def affine(
    requantization: Requantization, integers: NDArray[np.int64], tried: int = 8
) -> tuple[NDArray[np.int8], NDArray[np.int32], NDArray[np.float64]]:
    """Integers (weight, bias) and their unit, each (C,), with (weight * x + bias) * unit the
    result of a requantization before it is rounded.

    Of the weights that round its bias least, at first so many as ``tried``, each channel takes the
    one with which most ``integers`` (N,) are rounded as the requantization rounds them.

    Example (scale 0.5, offset 0.1): 65 * x + 13 in units of 1/130.
    """
    scale, offset = np.broadcast_arrays(requantization.scale, requantization.offset)
    slope = np.abs(scale)
    # A channel that hardly depends on its input has a unit that its bias fits.
    flat = slope < np.maximum(np.abs(offset), 1) / 2.0**23
    weights = np.arange((HIGHEST + 1) // 2, HIGHEST + 1)[:, None]  # (64, 1)
    exact = offset * weights / np.where(flat, 1, slope)
    weights = weights[np.abs(exact - np.rint(exact)).argsort(0)[:tried], 0]
    weights = np.where(flat, 0, weights)  # (tried, C)
    units = np.where(flat, np.maximum(np.abs(offset), 1) / 2.0**30, slope / np.maximum(weights, 1))
    weights = weights * np.sign(scale).astype(np.int64)
    biases = np.rint(offset / units)
    expected = requantization(np.repeat(integers[:, None], scale.size, 1), 1)  # (N, C)
    sums = weights * integers[:, None, None] + biases  # (N, tried, C)
    found = np.rint(sums.astype(np.float32) * units.astype(np.float32))
    found = np.clip(found, requantization.low, requantization.high)
    wrong = (found != expected[:, None]).sum(0)
    best = wrong.argmin(0), np.arange(scale.size)
    found = weights[best].astype(np.int8), biases[best].astype(np.int32), units[best]
    others = wrong[best] > 0
    if others.any() and tried < HIGHEST:
        part = replace(requantization, scale=scale[others], offset=offset[others])
        for mine, better in zip(found, affine(part, integers, HIGHEST), strict=True):
            mine[others] = better
    return found


def _headroom(weight: Integers, accumulator_bits: int) -> int:
    """What weights can be multiplied by, within int8 and 31-bit accumulators.

    Older kernels, and chips that do as they do, round a product twice: an accumulator times 31
    bits to an integer, and that to a step of the result. Near a border the first rounding can
    decide the second, less often by this factor.
    """
    largest = max(int(np.abs(weight).max(initial=0)), 1)
    return max(1, min(HIGHEST // largest, 2 ** (31 - accumulator_bits)))


def _simplified(value: Value) -> list[Transpose | PendingReshape]:
    """The moves that are left when those of unit axes are reshapes, those that undo each other are
    none, and reshapes are joined.
    """
    moves = list[Transpose | PendingReshape]()
    shapes = [value.shape]  # before every move that is left, and behind the last

    def reshaped(shape: tuple[int, ...]) -> None:
        if moves and isinstance(moves[-1], PendingReshape):
            moves.pop()
            shapes.pop()
        if shape != shapes[-1]:
            moves.append(PendingReshape(shape))
            shapes.append(shape)

    # Of a run of moves that only permute wide axes, or make and drop unit ones: the shape behind
    # it, and where each wide axis of it stood before the run.
    after = value.shape
    order = list(range(len(_wide(after))))

    def turned() -> None:
        if order != sorted(order):
            # Wide axes alone: beside others Vela charges up to thirty times as much for Ethos-U85.
            reshaped((1, *_wide(shapes[-1])))
            move = Transpose((0, *(axis + 1 for axis in order)))
            shape = tuple(shapes[-1][axis] for axis in move.order)
            moves.append(move)
            shapes.append(shape)
        reshaped(after)

    for move in value.moves:
        before = after
        after = replace(value, shape=before, moves=(move,)).moved_shape
        if isinstance(move, Transpose):
            wide = [axis for axis, size in enumerate(before) if size > 1]
            order = [order[wide.index(axis)] for axis in move.order if before[axis] > 1]
        elif _wide(before) != _wide(after):
            after, made = before, after
            turned()
            after = made
            order = list(range(len(_wide(after))))
            reshaped(after)
    turned()
    return moves


def _wide(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of the axes of more than one entry."""
    return tuple(size for size in shape if size > 1)


def _moved(array: NDArray[Any], moves: Sequence[Transpose | PendingReshape]) -> NDArray[Any]:
    for move in moves:
        if isinstance(move, Transpose):
            array = array.transpose(move.order)
        else:
            array = array.reshape(move.shape)
    return array


def _four(shape: tuple[int, ...], axis: int) -> tuple[int, int, int, int]:
    """Four axes, the last of which begins with ``axis``."""
    height = shape[1] if axis > 1 else 1
    return 1, height, math.prod(shape[1:axis]) // height, math.prod(shape[axis:])
