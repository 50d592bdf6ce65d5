"""The integer model as one C99 header, for firmware: weights, constants and a reference run.

Nothing in it is a float but the scales that say what its integers mean, and nothing has to be
linked to it. Activations stand in one static block of bytes that their lifetimes share.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archnet.deploy.integer import (
    ACCUMULATOR_BITS,
    IntegerGrid,
    IntegerModel,
    IntegerStep,
    Requantization,
    square,
)
from archnet.deploy.sentences import Sentences, embedding_of, require_integers
from archnet.deploy.writer import ExportError
from archnet.ops import (
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
    Window,
)

LINE = 96  # characters


def to_c(model: IntegerModel) -> str:
    """A self-contained C99 header that computes what `IntegerModel.run` computes, bit for bit.

    It holds ``archnet_run(input, output)``: ``input`` are ARCHNET_INPUTS integers of the first
    grid in (C, H, W) order, int8_t or uint8_t, with round(x / ARCHNET_INPUT_SCALE) clipped to
    ARCHNET_INPUT_LOW..HIGH; ``output`` are ARCHNET_OUTPUTS int32_t, of which each is worth its
    entry of ``archnet_output_scale``. Weights of 8 bits are int8_t; narrower ones are packed at
    their width, least significant bits first and without gaps, in two's complement (one bit: 1
    means +1, 0 means -1). The block ARCHNET_ARENA_BYTES holds all activations, a byte each.

    Args:
        model: from `to_integers`, with requantization "multiplier" or "power_of_two".

    Returns:
        The text of the header.

    Raises:
        ExportError: requantization is "float", the input is read on several grids, integers fit
            no byte, an accumulator does not fit 32 bits or a multiplier not 31.
    """
    entry = model.entry
    grid, shape = model.grids[entry.name], model.shapes[entry.name]
    places, first = list[tuple[str, str]](), 0
    for name in model.outputs:
        places.append((name, f"output + {first}" if first else "output"))
        first += math.prod(model.shapes[name])
    function = _Function(
        model, "archnet", {entry.name: "(const uint8_t *)input"}, places, model.outputs
    )
    values = {
        "INPUTS": math.prod(shape),
        "INPUT_SCALE": f"{np.float32(grid.scale):.9e}f",
        "INPUT_LOW": grid.low,
        "INPUT_HIGH": grid.high,
        "OUTPUTS": first,
        "ARENA_BYTES": function.arena,
    }
    results = [model.shapes[name] for name in model.outputs]
    shapes = ", ".join(map(_shape, results))
    kind = "int8_t" if grid.low < 0 else "uint8_t"
    about = [f"Input {_shape(shape)}, output {shapes}."]
    about += ["Outputs stand one behind another, in this order."] if len(results) > 1 else []
    about += ["Include it in one file. Activations are static: archnet_run() is not reentrant."]
    run = f"static inline void archnet_run(const {kind} *input, int32_t *output)"
    return _header(about, values, _output_scale(model, model.outputs), {run: function})


@dataclass(frozen=True)
class SentenceLayout:
    """Where a translator's memory and states stand in their blocks of bytes: first byte and size
    of each, and how many bytes they are in all.
    """

    memory: Mapping[str, tuple[int, int]]
    states: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, sentences: Sentences) -> SentenceLayout:
        shapes = sentences.decoder.student.graph.shapes
        parts = sentences.parts
        return cls(_placed(parts.memory, shapes), _placed(list(parts.states), shapes))

    @staticmethod
    def size(block: Mapping[str, tuple[int, int]]) -> int:
        return sum(size for _, size in block.values())


def _placed(
    names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, int]]:
    found, first = {}, 0
    for name in names:
        found[name] = first, math.prod(shapes[name])
        first += found[name][1]
    return found


def translator_to_c(parts: Stepwise) -> str:
    """A self-contained C99 header of a translator without attention, bit for bit its golden model.

    ``archnet_encode(tokens, length, memory)`` reads the token numbers of a sentence with its end
    mark, 1 to ARCHNET_POSITIONS of them, and fills ARCHNET_MEMORY_BYTES bytes.
    ``archnet_decode(token, position, memory, states, scores)`` reads a token, changes the
    ARCHNET_STATE_BYTES bytes of ``states``, which are zeros before the first token, and gives
    ARCHNET_TOKENS scores of what follows, of which each is worth its entry of
    ``archnet_output_scale``. Weights stand as in `to_c`.

    Args:
        parts: of a quantized student.

    Raises:
        ExportError: the student computes something in its target's own arithmetic, or does not
            fit as `to_c` says.
    """
    embedding = embedding_of(parts.encoder)
    sentences = Sentences.of(parts, "arch5", length=embedding.positions)
    require_integers(sentences, "c")
    encoder, decoder = sentences.integers()
    layout = SentenceLayout.of(sentences)
    columns = sentences.columns
    assert columns is not None
    within = {name: f"memory + {first}" for name, (first, _) in layout.memory.items()}
    kept = {name: f"states + {first}" for name, (first, _) in layout.states.items()}
    encode = _Function(
        encoder,
        "archnet_encoder",
        {},
        list(zip(encoder.outputs, within.values(), strict=True)),
        [],
        "length",
    )
    scores, *after = decoder.outputs
    decode = _Function(
        decoder,
        "archnet_decoder",
        {name: f"({place})" for name, place in {**within, **kept}.items()},
        [(scores, "scores"), *zip(after, kept.values(), strict=True)],
        [scores],
    )
    for name, place in within.items():
        channels = layout.memory[name][1] // columns
        encode.after.append(f"archnet_repeat({place}, length, {columns}, {channels});")
    values = {
        "TOKENS": embedding.tokens,
        "POSITIONS": embedding.positions,
        "MEMORY_BYTES": SentenceLayout.size(layout.memory),
        "STATE_BYTES": SentenceLayout.size(layout.states),
        "ARENA_BYTES": encode.arena + decode.arena,
    }
    about = [
        "A translator. archnet_encode() reads a sentence, archnet_decode() one token a call;",
        "states are zeros before the first token.",
        "Include it in one file. Activations are static: no function is reentrant.",
    ]
    functions = {
        "static inline void archnet_encode(\n"
        "    const int32_t *tokens, size_t length, uint8_t *memory)": encode,
        "static inline void archnet_decode(\n"
        "    int32_t token, size_t position, const uint8_t *memory, uint8_t *states, "
        "int32_t *scores)": decode,
    }
    return _header(about, values, _output_scale(decoder, [scores]), functions, sentences=True)


def _output_scale(model: IntegerModel, outputs: Sequence[str]) -> str:
    units = [model.unit(name).reshape(-1) for name in outputs]
    scales = np.concatenate(units).astype(np.float32)
    return _array("float", "archnet_output_scale", [f"{s:.9e}f" for s in scales])


def _header(
    about: Sequence[str],
    values: Mapping[str, Any],
    scales: str,
    functions: Mapping[str, _Function],
    sentences: bool = False,
) -> str:
    """The whole text: what it is, constants by name, kernels, and functions by their heads."""
    first, *more = about
    own = {
        "LONGEST_ROW": max(function.longest_row for function in functions.values()),
        "RANK": max(function.rank for function in functions.values()),
    }
    kernels = ["kernels.h", "sentences.h"] if sentences else ["kernels.h"]
    parts = [
        f"/* Written by archnet. {first}",
        *(f" * {line}" for line in more),
        " * Weights below 8 bits are packed at their width, least significant bits first.",
        " */",
        "#ifndef ARCHNET_H",
        "#define ARCHNET_H",
        "",
        *(f"#define ARCHNET_{key} {value}" for key, value in {**values, **own}.items()),
        "",
        *(files("archnet.deploy").joinpath(k).read_text(encoding="utf-8") for k in kernels),
        "/* What one unit of each output is worth. */",
        scales,
    ]
    for head, function in functions.items():
        parts += [*function.constants, "", head, "{", *function.body(), "}"]
    return "\n".join([*parts, "", "#endif", ""])


def pack_bits(values: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Integers as a stream of ``bits`` each, least significant first, and a spare byte.

    Readers take two bytes at a time, so that a value may lie across a border.

    Example (2 bits): 1, 0, -1, -2 is the byte 0b10110001, then the spare 0.
    """
    fields = values.reshape(-1).astype(np.int64) & ((1 << bits) - 1)
    stream = (fields[:, None] >> np.arange(bits)) & 1
    packed = np.packbits(stream.astype(np.uint8).reshape(-1), bitorder="little")
    return np.append(packed, np.uint8(0))


@dataclass(frozen=True)
class _Buffer:
    """Where a value stands: an expression in C, and what its elements are."""

    place: str
    grid: IntegerGrid | None

    @property
    def size(self) -> str:
        """Of an element, in C."""
        return "1" if self.grid else "sizeof(int32_t)"

    @property
    def signed(self) -> int:
        return int(self.grid is not None and self.grid.low < 0)


class _Function:
    """One walk along the steps of a model: constants on one side, calls on the other.

    Args:
        model: what is written.
        prefix: of all names.
        given: for every input that is integers already, an expression of where it stands.
        results: every result, and where it is written: as int32_t, or as bytes where it is not
            ``widened``.
        length: an expression of the positions that are used of those that the shapes have.
    """

    def __init__(
        self,
        model: IntegerModel,
        prefix: str,
        given: Mapping[str, str],
        results: Sequence[tuple[str, str]],
        widened: Sequence[str],
        length: str | None = None,
    ) -> None:
        self.model, self.given, self.results, self.length = model, given, results, length
        self.widened = {*widened}
        self.constants: list[str] = []
        self.calls: list[str] = []
        self.names = _identifiers([step.name for step in model.steps], prefix)
        self.rank = max([4, *(len(model.shapes[step.name]) for step in model.steps)])
        self.roots = self._roots()
        self.offsets, self.arena = self._placed()
        self.longest_row = 1
        self.after: list[str] = []  # calls behind all others
        self._check()
        for step in model.steps:
            if step.name not in given:
                self._step(step)

    def body(self) -> Iterator[str]:
        """The lines between the braces."""
        yield f"    static uint8_t arena[{max(self.arena, 1)}];"
        yield from (f"    {line}" for line in self._raw_buffers())
        yield "    (void)arena;"
        yield from (f"    {line}" for line in self.calls)
        yield from (f"    {line}" for line in (*self._ends(), *self.after))

    def _check(self) -> None:
        for name, grid in self.model.grids.items():
            if not (0 <= grid.low <= grid.high <= 255 or -128 <= grid.low <= grid.high <= 127):
                raise ExportError(
                    f"step {name}: its integers {grid.low} to {grid.high} do not fit a byte, which "
                    "form=c needs: lower quant.act_bits to 8 or less"
                )
        for name, bits in self.model.accumulators().items():
            if bits > ACCUMULATOR_BITS:
                raise ExportError(
                    f"step {name}: its accumulator needs {bits} bits, and form=c has int32_t: "
                    "lower quant.weight_bits or quant.act_bits"
                )

    # Memory ---------------------------------------------------------------------------------

    def _roots(self) -> dict[str, str]:
        """The value whose buffer a value stands in: a reshape moves nothing."""
        roots = {name: name for name in self.given}
        for step in self.model.steps:
            if step.name in roots:
                continue
            alike = isinstance(step.operator, Reshape)
            roots[step.name] = roots[step.inputs[0]] if alike else step.name
        return roots

    def _placed(self) -> tuple[dict[str, int], int]:
        """Byte offsets in the arena, and its size: the largest first, each as low as it goes."""
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        for index, step in enumerate(self.model.steps):
            if self.roots[step.name] not in self.given:
                first.setdefault(self.roots[step.name], index)
            for name in (step.name, *step.inputs):
                if name in self.roots:
                    last[self.roots[name]] = index
        last.update({self.roots[name]: len(self.model.steps) for name in self.model.outputs})
        size = {
            name: math.prod(self.model.shapes[name])
            for name in first
            if name in self.model.grids and name not in self.given
        }
        offsets: dict[str, int] = {}
        for name in sorted(size, key=lambda name: (-size[name], first[name])):
            taken = sorted(
                (offsets[other], offsets[other] + size[other])
                for other in offsets
                if first[other] <= last[name] and first[name] <= last[other]
            )
            offset = 0
            for begin, end in taken:
                if offset + size[name] <= begin:
                    break
                offset = max(offset, end)
            offsets[name] = offset
        return offsets, max((offsets[name] + size[name] for name in size), default=0)

    def _buffer(self, name: str) -> _Buffer:
        root = self.roots[name]
        grid = self.model.grids.get(name)
        if root in self.given:
            return _Buffer(self.given[root], grid)
        if grid is not None:
            return _Buffer(f"arena + {self.offsets[root]}", grid)
        places = [at for name, at in self.results if self.roots[name] == root]
        if places:
            return _Buffer(places[0], None)
        return _Buffer(f"{self.names[root]}_raw", None)

    def _raw_buffers(self) -> Iterator[str]:
        for name, root in self.roots.items():
            place = self._buffer(name).place
            if name == root and place.endswith("_raw"):
                yield f"static int32_t {place}[{math.prod(self.model.shapes[name])}];"

    def _ends(self) -> Iterator[str]:
        """What brings every result to its place."""
        for name, at in self.results:
            buffer, size = self._buffer(name), math.prod(self.model.shapes[name])
            if buffer.grid is not None and name in self.widened:
                yield f"archnet_widen({buffer.place}, {buffer.signed}, {at}, {size});"
            elif buffer.place != at:  # one that is another result as well
                yield f"memcpy({at}, {buffer.place}, {size} * {buffer.size});"

    # Steps ----------------------------------------------------------------------------------

    def _step(self, step: IntegerStep) -> None:
        operator, shapes = step.operator, self.model.shapes
        shape, before, y = shapes[step.name], shapes[step.inputs[0]], self._buffer(step.name)
        comment = f"{_plain(step.name)}: {type(operator).__name__} {_shape(before)}"
        comment += f" to {_shape(shape)}"
        comment += f", {_plain(step.origin)}" if step.origin else ""
        self.calls += ["", f"/* {comment} */"]
        if isinstance(operator, TokenEmbedding):
            count = "tokens, length, 0" if self.length else "&token, 1, position"
            self._call("embed", f"&{self._layer(step)}", count, y.place)
            return
        x = self._buffer(step.inputs[0])
        if isinstance(operator, Convolution | FullyConnected):
            place = (y.place, "NULL") if y.grid else ("NULL", y.place)
            layer = f"&{self._layer(step)}, {x.place}, {x.signed}, {', '.join(place)}"
            if isinstance(operator, FullyConnected):
                self._call("fully_connected", layer, self.length or math.prod(shape[:-1]))
            else:
                stride, padding = square(step)
                sizes = (*before, *shape[1:], operator.kernel[0], stride, padding)
                self._call("conv", layer, *sizes)
        elif isinstance(operator, MaxPool):
            stride, _ = square(step)
            left, _, top, _ = operator.padding
            low = self.model.grids[step.name].low
            places = (x.place, x.signed, y.place)
            self._call("max_pool2x2", *places, *before, *shape[1:], stride, left, top, low)
        elif step.requantization is not None:
            scale = self._requantization(self.names[step.name], step.requantization)
            inner = math.prod(shape[1:])
            self._call("affine", f"&{scale}", x.place, x.signed, y.place, shape[0], inner)
        elif isinstance(operator, Concat):
            self._concatenation(step, y)
        elif isinstance(operator, Window):
            sides = operator.before, operator.after
            self._call("window", x.place, y.place, self.length, before[-1], *sides)
        elif isinstance(operator, Permute):
            strides = _strides(before)
            # The batch is axis 0 of the order, and no axis here.
            order = [strides[axis - 1] for axis in operator.order[1:]]
            self._copy(shape, x, order, y, _strides(shape))
        elif isinstance(operator, Slice):
            axis, strides = operator.axis - 1, _strides(before)
            begin = operator.start * strides[axis]
            strides[axis] *= operator.step
            self._copy(shape, x, strides, y, _strides(shape), x_first=begin)
        elif isinstance(operator, Pad):
            strides = _strides(shape)
            pairs = zip(operator.pads, strides, strict=True)
            begin = sum(left * stride for (left, _), stride in pairs)
            self.calls.append(f"memset({y.place}, 0, {math.prod(shape)} * {y.size});")
            self._copy(before, x, _strides(before), y, strides, y_first=begin)
        elif isinstance(operator, Reshape):
            self.calls[-1] = f"/* {comment}: stays where it is */"
        else:
            raise ExportError(f"step {step.name}: no way to write a {type(operator).__name__} to C")

    def _concatenation(self, step: IntegerStep, y: _Buffer) -> None:
        assert isinstance(step.operator, Concat)
        strides = _strides(self.model.shapes[step.name])
        axis, first = step.operator.axis - 1, 0
        for name in step.inputs:
            shape = self.model.shapes[name]
            self._copy(shape, self._buffer(name), _strides(shape), y, strides, y_first=first)
            first += shape[axis] * strides[axis]

    def _call(self, kernel: str, *arguments: Any) -> None:
        text = f"archnet_{kernel}({', '.join(map(str, arguments))});"
        self.calls.append(text)

    def _copy(
        self,
        shape: Sequence[int],
        x: _Buffer,
        x_strides: Sequence[int],
        y: _Buffer,
        y_strides: Sequence[int],
        x_first: int = 0,
        y_first: int = 0,
    ) -> None:
        def axes(sizes: Sequence[int], fill: int) -> str:
            filled = [fill] * (self.rank - len(sizes)) + list(sizes)
            return f"(const size_t[]){{{', '.join(map(str, filled))}}}"

        ends = f"{y.place}, {y_first}, {x.place}, {x_first}"
        sizes = f"{axes(shape, 1)}, {axes(y_strides, 0)}, {axes(x_strides, 0)}"
        self.calls.append(f"archnet_copy({y.size}, {ends},\n        {sizes});")

    # Constants ------------------------------------------------------------------------------

    def _layer(self, step: IntegerStep) -> str:
        assert step.weight is not None
        assert step.bias is not None
        name, weight = self.names[step.name], step.weight
        bits = _width(weight, step.weight_bits)
        stored = pack_bits(weight if bits > 1 else (weight + 1) // 2, bits)
        if bits == 8:
            stored = stored[:-1]
        row = weight[0].size
        if not isinstance(step.operator, TokenEmbedding):
            self.longest_row = max(self.longest_row, row)
        self.constants += [
            "",
            f"/* {_plain(step.name)}: weights {_shape(weight.shape)} of {bits} bits */",
            _bytes_array(f"{name}_weight", stored, bits),
            _array("int32_t", f"{name}_bias", step.bias),
        ]
        scale = "NULL"
        if step.requantization is not None:
            scale = f"&{self._requantization(name, step.requantization)}"
        fields = f"{name}_weight, {bits}, {name}_bias, {len(weight)}, {row}, {scale}"
        self.constants.append(f"static const archnet_layer {name} = {{{fields}}};")
        return name

    def _requantization(self, name: str, scale: Requantization) -> str:
        if scale.kind == "float":
            raise ExportError(
                "form=c computes only with integers, and this model requantizes in float: call "
                'to_integers with requantization="multiplier" or "power_of_two"'
            )
        multiplier, shift, offset = scale.multiplier, scale.shift, scale.shifted_offset
        if np.abs(multiplier).max(initial=0) >= 2**31:
            raise ExportError(
                f"{name}: a multiplier does not fit 31 bits: call settle(student) before the export"
            )
        count = np.broadcast_shapes(multiplier.shape, shift.shape, offset.shape)
        each = int(math.prod(count) > 1)
        self.constants += [
            _array("int32_t", f"{name}_multiplier", np.broadcast_to(multiplier, count)),
            _array("uint8_t", f"{name}_shift", np.broadcast_to(shift, count)),
        ]
        added = "NULL"
        if offset.any():
            added = f"{name}_offset"
            self.constants.append(_array("int64_t", added, np.broadcast_to(offset, count)))
        fields = f"{name}_multiplier, {name}_shift, {added}, {each}, {scale.low}, {scale.high}"
        self.constants.append(f"static const archnet_scale {name}_scale = {{{fields}}};")
        return f"{name}_scale"


def _width(weight: NDArray[Any], bits: int) -> int:
    """Bits to store a weight at; the grid of one bit has no zero, which an exact layer may need."""
    return 2 if bits == 1 and not (np.abs(weight) == 1).all() else bits


def _strides(shape: Sequence[int]) -> list[int]:
    """Elements from one index to the next, of every axis."""
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _identifiers(names: Sequence[str], prefix: str) -> Mapping[str, str]:
    """C identifiers; the numbers keep them apart whatever the names are."""
    return {
        name: f"{prefix}_{index}_{re.sub(r'[^0-9A-Za-z_]', '_', name)}"
        for index, name in enumerate(names)
    }


def _plain(text: str) -> str:
    """Without what could end a comment."""
    return re.sub(r"[^0-9A-Za-z_.\[\] -]", "_", text)


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "1"


def _bytes_array(name: str, stored: NDArray[np.uint8], bits: int) -> str:
    if bits == 8:
        return _array("int8_t", name, stored.view(np.int8))
    return _array("uint8_t", name, stored)


def _array(kind: str, name: str, values: Any) -> str:
    """A constant array, its lines filled."""
    suffix = "LL" if kind == "int64_t" else ""
    # The lowest int32 has no literal of its own in C.
    words = ["INT32_MIN" if v == -(2**31) else f"{v}{suffix}" for v in values]
    lines, line = [], ""
    for word in words:
        if line and len(line) + len(word) + 2 > LINE:
            lines.append(line)
            line = ""
        line += f"{word}, "
    lines.append(line)
    body = "\n".join(f"    {line.rstrip()}" for line in lines)
    return f"static const {kind} {name}[{len(words)}] = {{\n{body}\n}};"
