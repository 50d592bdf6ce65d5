"""Collects the nodes of an ONNX graph, and keeps layout moves back until somebody reads them."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from archnet.config import DialectConfig
from archnet.errors import ArchnetError
from archnet.hardware.cost import BIAS_BITS
from archnet.hardware.onnx_graph import WIDTH_KEY
from archnet.quant import Quantizer


class ExportError(ArchnetError):
    """A student that cannot be written, or a file that cannot be written or run."""


@dataclass(frozen=True)
class Container:
    """A type of ONNX that integers stand in, from ``lowest`` to ``highest``."""

    dtype: np.dtype[Any]
    lowest: int
    highest: int


# What bounds of integers lie above them: OpenVINO 2026.4 cuts a bound's fraction off, and a product
# of an integer and a scale may lie next below it.
QUARTER = 0.25

UINT8 = Container(np.dtype(np.uint8), 0, 255)


@dataclass(frozen=True)
class Grid:
    """The integers ``low`` to ``high`` of ``bits``, times ``scale``; zero is on the grid.

    Grids are equal when their numbers are; ``name`` is that of the constants in the file. There
    an integer stands in ``container``, as itself plus ``zero``.
    """

    scale: float
    low: int
    high: int
    name: str = field(compare=False)
    bits: int = field(compare=False)
    container: Container = field(compare=False)
    zero: int = field(compare=False)


@dataclass(frozen=True)
class Transpose:
    order: tuple[int, ...]


@dataclass(frozen=True)
class Reshape:
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Value:
    """A value of the student: an ONNX tensor, and the moves that still have to be made on it.

    ``shape`` is the tensor's (-1 stands for the batch, or for batch times positions); ``grid``
    is the grid of its integers, or None for a float tensor. What acts element by element goes
    before the pending moves, so that it meets the operator it belongs to; a move and its inverse
    cancel. ``name`` is the tensor's name once the moves are made.
    """

    name: str
    tensor: str
    shape: tuple[int, ...]
    grid: Grid | None = None
    moves: tuple[Transpose | Reshape, ...] = ()

    @property
    def moved_shape(self) -> tuple[int, ...]:
        shape = self.shape
        for move in self.moves:
            if isinstance(move, Reshape):
                shape = move.shape
            else:
                shape = tuple(shape[axis] for axis in move.order)
        return shape

    def transposed(self, order: tuple[int, ...], name: str) -> "Value":
        moves = self.moves
        if moves and isinstance(moves[-1], Transpose):
            order = tuple(moves[-1].order[axis] for axis in order)
            moves = moves[:-1]
        if order != tuple(range(len(order))):
            moves = (*moves, Transpose(order))
        return replace(self, name=name, moves=moves)

    def reshaped(self, shape: tuple[int, ...], name: str) -> "Value":
        moves = (
            self.moves[:-1] if self.moves and isinstance(self.moves[-1], Reshape) else self.moves
        )
        before = replace(self, moves=moves)
        if (shorter := before._without_units(shape, name)) is not None:
            return shorter
        if before.moved_shape != shape:
            moves = (*moves, Reshape(shape))
        return replace(self, name=name, moves=moves)

    def _without_units(self, shape: tuple[int, ...], name: str) -> "Value | None":
        """The value in a shape that lacks axes of one entry: where they were made by a reshape in
        front of a transposition, that makes them no more.
        """
        if len(self.moves) < 2:
            return None
        made, turn = self.moves[-2:]
        if not isinstance(made, Reshape) or not isinstance(turn, Transpose):
            return None
        kept, places = list(shape), list[int]()
        for place, size in zip(turn.order, self.moved_shape, strict=True):
            if kept and kept[0] == size:
                kept.pop(0)
                places.append(place)
            elif size != 1:
                return None
        if kept or len(shape) == len(turn.order):
            return None
        ranks = sorted(places)
        source = replace(self, moves=self.moves[:-2])
        source = source.reshaped(tuple(made.shape[place] for place in ranks), name)
        return source.transposed(tuple(ranks.index(place) for place in places), name)


class Writer:
    """An ONNX graph that grows node by node. Every node is named after the tensor it writes, but
    for those of results, which have names of their own.

    ``origin`` is the teacher's module path that the nodes being written come from; each node
    carries it in its metadata.

    How weights and rounded activations stand in the file is what `weight`, `bias`, `rounded` and
    `container` decide; here it is form qdq, and other forms override them.

    Args:
        dialect: how the target's files are written.
    """

    form = "qdq"
    domain = ""  # of operators that are not ONNX's own
    bias_zeros = True  # whether zero points stand beside biases
    rows = True  # whether a quantized layer at every position is a Gemm on rows

    def __init__(self, dialect: DialectConfig) -> None:
        self.dialect, self.opset = dialect, dialect.opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.origin = ""
        # Metadata of the model. Some tools insist on another producer than who wrote the file.
        self.properties = {"form": self.form, "written_by": "archnet"}
        self._moved: dict[tuple[str, tuple[Transpose | Reshape, ...]], str] = {}
        self._floats: dict[str, str] = {}
        self._zeros: Counter[str] = Counter()

    def node(self, operator: str, inputs: Sequence[str], *outputs: str, **attributes: Any) -> str:
        """Add a node, and give the name of its first output."""
        node = helper.make_node(operator, inputs, outputs, name=outputs[0], **attributes)
        if self.origin:
            node.metadata_props.add(key="origin", value=self.origin)
        self.nodes.append(node)
        return outputs[0]

    def note(self, bits: int) -> None:
        """Note the width of the integers that the last node gives: its types may be wider."""
        self.nodes[-1].metadata_props.add(key=WIDTH_KEY, value=str(bits))

    def constant(self, name: str, values: Any, dtype: Any) -> str:
        array = np.asarray(values, dtype)
        if array.dtype == np.int64:
            # Rockchip's compiler looks for a Pad's pads among the numbers, not in raw bytes.
            tensor = helper.make_tensor(name, TensorProto.INT64, array.shape, array.flatten())
        else:
            tensor = numpy_helper.from_array(array, name)
        self.constants[name] = tensor
        return name

    def widened(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in which a product of tokens and a constant matrix is written."""
        return shape

    def turned(self, matrix: str) -> str:
        """The transposed of a constant matrix of floats."""
        if matrix in self.constants:
            values = numpy_helper.to_array(self.constants[matrix])
            return self.constant(matrix, values.T, np.float32)
        return self.node("Transpose", [matrix], f"{matrix}.turned", perm=[1, 0])

    def integers(self, name: str, values: Tensor, dtype: Any) -> str:
        """Store a float tensor of integers as ``dtype``; no value may be lost."""
        array: NDArray[Any] = values.detach().cpu().double().numpy()
        with np.errstate(invalid="ignore"):
            stored = array.astype(dtype)
        if not np.array_equal(stored, array):
            raise ExportError(
                f"{name} does not fit {np.dtype(dtype)}: its values are {array.min():g} to "
                f"{array.max():g}; lower its width, or look for a scale that is not finite"
            )
        return self.constant(name, stored, dtype)

    def tensor(self, value: Value) -> str:
        """The tensor of a value, with its moves made: integers where it is on a grid."""
        tensor = value.tensor
        for count, move in enumerate(value.moves, start=1):
            key = (value.tensor, value.moves[:count])
            if key not in self._moved:
                output = value.name if count == len(value.moves) else f"{value.name}.move{count}"
                if isinstance(move, Transpose):
                    self.carried("Transpose", [tensor], value.grid, output, perm=move.order)
                else:
                    shape = self.constant(f"{output}.shape", move.shape, np.int64)
                    self.carried("Reshape", [tensor], value.grid, output, constants=[shape])
                self._moved[key] = output
            tensor = self._moved[key]
        return tensor

    def carried(
        self,
        operator: str,
        tensors: Sequence[str],
        grid: Grid | None,
        *outputs: str,
        constants: Sequence[str] = (),
        **attributes: Any,
    ) -> str:
        """An operator that hands values on as they are, on one grid before and behind it.

        Like all others it works on floats, between DequantizeLinear and QuantizeLinear, which give
        the same integers again; a runtime with a kernel for integers leaves both out.

        Args:
            operator: its name in ONNX.
            tensors: what it reads: integers where there is a grid.
            grid: of what it reads and writes; None: floats.
            outputs: names of what it writes.
            constants: further inputs.
            attributes: of the node.

        Returns:
            The first output.
        """
        if grid is None:
            return self.node(operator, [*tensors, *constants], *outputs, **attributes)
        floats = [self.dequantized(tensor, grid) for tensor in tensors]
        carried = [f"{output}.carried" for output in outputs]
        self.node(operator, [*floats, *constants], *carried, **attributes)
        for source, output in zip(carried, outputs, strict=True):
            self.node("QuantizeLinear", [source, *self.grid(grid)], output, axis=0)
            self.note(grid.bits)
        return outputs[0]

    def floating(self, value: Value) -> str:
        """The tensor of a value as float, with its moves made."""
        return self.dequantized(self.tensor(value), value.grid)

    def dequantized(self, tensor: str, grid: Grid | None) -> str:
        if grid is None:
            return tensor
        if tensor not in self._floats:
            self._floats[tensor] = self.node(
                "DequantizeLinear", [tensor, *self.grid(grid)], f"{tensor}.float", axis=0
            )
        return self._floats[tensor]

    def grid(self, grid: Grid) -> tuple[str, str]:
        """The constants (scale, zero point) of a grid: numbers, beside which an axis means nothing.

        It is written as 0 all the same: with the default, 1, OpenCV 5.0 takes the number for that
        of the only channel of a tensor (B, 1), and computes something else. Each node has a zero
        point of its own: OpenVINO 2026.4 gives one the shape of the tensor beside it, and refuses
        the file where that is a constant of other nodes as well.
        """
        self._zeros[grid.name] += 1
        count = self._zeros[grid.name]
        zero = f"{grid.name}.zero{count if count > 1 else ''}"
        return self.step(grid), self.constant(zero, grid.zero, grid.container.dtype)

    def step(self, grid: Grid) -> str:
        """The constant scale of a grid."""
        return self.constant(f"{grid.name}.scale", grid.scale, np.float32)

    def weight(
        self, name: str, integers: Tensor, scale: Tensor, bits: int, *, is_constant: bool = False
    ) -> str:
        """A constant float tensor: ``integers`` (O, ...) of ``bits`` times ``scale``.

        Of a layer that ``is_constant``, such as the ones of an addition, nobody has chosen bits.
        """
        return self.scaled(name, integers, scale, np.int8, bits)

    def bias(self, name: str, integers: Tensor, scale: Tensor) -> str:
        """A constant float tensor: ``integers`` (O,), in 32 bits, times ``scale``."""
        if self.dialect.bias == "float":
            values = integers.detach().cpu().double() * scale.detach().cpu().double()
            return self.constant(name, values, np.float32)
        return self.scaled(name, integers, scale, np.int32, BIAS_BITS)

    def placed(self, name: str, quantizer: Quantizer) -> Grid:
        """The grid of a quantizer of activations, as it stands in the file.

        Args:
            name: of the step.
            quantizer: calibrated.

        Raises:
            ExportError: its scale is not positive and finite, or no type of this form holds it.
        """
        scale, low, high = float(quantizer.scale), quantizer.low, quantizer.high
        if not (math.isfinite(scale) and scale > 0):
            raise ExportError(f"step {name} has a scale of {scale}; calibrate it on finite inputs")
        container, zero = self.container(name, low, high)
        return Grid(scale, low, high, name, quantizer.bits, container, zero)

    def container(self, name: str, low: int, high: int) -> tuple[Container, int]:
        """What integers of activations stand in, and the integer there that means zero.

        Signed ones begin at 0 as well: on x86 only unsigned activations have fast kernels.
        """
        zero = max(0, -low)
        if high + zero > UINT8.highest:
            raise self.too_wide(name, low, high)
        return UINT8, zero

    def rounded(self, tensor: str, source: str, grid: Grid, low: int, high: int) -> Grid | None:
        """Write ``tensor``: the float ``source`` on the grid, as integers from ``low`` to ``high``.

        Returns:
            The grid, where ``tensor`` holds its integers; None where it holds their values.
        """
        if self.dialect.clip == "always":
            # In front of the rounding a Clip is one that does nothing, which ONNX Runtime leaves
            # out, so that the layer becomes an integer one; the width has a Clip of its own.
            ends = grid.container.lowest - grid.zero, grid.container.highest - grid.zero
            narrow = (low, high) != ends
            first = f"{tensor}.unclipped" if narrow else tensor
            source = self.clipped(first, source, grid, *ends)
            if narrow:
                self.node("QuantizeLinear", [source, *self.grid(grid)], first, axis=0)
                self.note(grid.bits)
                floats = self.dequantized(first, grid)
                source = self.clipped(tensor, floats, grid, low, high, QUARTER)
        else:
            source = self.clipped(tensor, source, grid, low, high)
        self.node("QuantizeLinear", [source, *self.grid(grid)], tensor, axis=0)
        self.note(grid.bits)
        return grid

    def clipped(
        self, tensor: str, source: str, grid: Grid, low: int, high: int, above: float = 0.0
    ) -> str:
        """The float ``source`` held to the values of the integers ``low`` to ``high``.

        At the bounds of the grid's container the rounding behind it saturates by itself. Rounding
        and clipping may change places: a bound is on the grid, or ``above`` it, in steps, from
        where it is rounded back.
        """
        held = grid.container
        saturates = (low + grid.zero, high + grid.zero) == (held.lowest, held.highest)
        if saturates and self.dialect.clip == "needed":
            return source
        step = np.float32(grid.scale)
        given = [
            self.constant(f"{tensor}.{key}", (bound and bound + above) * step, np.float32)
            for key, bound in (("low", low), ("high", high))
        ]
        return self.node("Clip", [source, *given], f"{tensor}.clipped")

    def result(self, value: Value, seen: tuple[float, float] | None) -> Value:
        """The network's result as the dialect has it.

        Args:
            value: of the result.
            seen: its range (`StudentGraph.output_ranges`); None: of a float student.
        """
        if self.dialect.output == "float" or value.grid is not None or seen is None:
            return value
        low, high = min(seen[0], 0.0), max(seen[1], 0.0)
        scale = float(np.float32((high - low) / UINT8.highest)) or 1.0
        zero = round(-low / scale)
        name = f"{value.name}_result"
        grid = Grid(scale, -zero, UINT8.highest - zero, name, 8, UINT8, zero)
        found = self.rounded(name, self.tensor(value), grid, grid.low, grid.high)
        return Value(name, name, value.moved_shape, found)

    def too_wide(self, name: str, low: int, high: int) -> ExportError:
        """The error for a grid that no type of this form holds."""
        return ExportError(
            f"step {name}: its integers {low} to {high} fit no type of form={self.form}: "
            "lower quant.act_bits to 8 or less"
        )

    def scaled(
        self, name: str, integers: Tensor, scale: Tensor, dtype: Any, bits: int, packed: Any = None
    ) -> str:
        """A constant: ``integers`` (O, ...) of ``bits`` times ``scale``, (O,) or one number.

        Args:
            name: of the integers in the file.
            integers, scale, bits: as above.
            dtype: of what is multiplied by the scale.
            packed: a narrower type that the file holds; None: that one.
        """
        stored = self.integers(name, integers, packed or dtype)
        if packed is not None:
            wide = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
            stored = self.node("Cast", [stored], f"{name}.wide", to=wide)
        factors = positive(name, scale)
        step = self.constant(f"{name}.scale", factors, np.float32)
        constants = [stored, step]
        if dtype != np.int32 or self.bias_zeros:
            # ONNX Runtime fuses no Gemm whose weight leaves its zero point out, and
            # rknn-toolkit2 2.5.0 ends in an IndexError where a bias does.
            constants.append(self.constant(f"{name}.zero", np.zeros(factors.shape), dtype))
        axis = {"axis": 0} if factors.ndim else {}
        output = self.node("DequantizeLinear", constants, f"{name}.float", **axis)
        self.note(bits)
        return output

    @property
    def producer(self) -> dict[str, str]:
        """Who wrote the model, as its header says."""
        name, _, version = self.dialect.producer.partition(" ")
        return {"producer_name": name, "producer_version": version}

    def results(
        self, inputs: Mapping[str, Any], outputs: Sequence[tuple[str, Value]]
    ) -> dict[str, str]:
        """Give the tensors of results the names of these.

        Args:
            inputs: of the graph, by name.
            outputs: name and value of each result.

        Returns:
            By the name of each result's tensor, in order, what it was called before.
        """
        found: dict[str, str] = {}
        tensors = [self.floating(value) for _, value in outputs]
        for tensor, (wanted, _) in zip(tensors, outputs, strict=True):
            made = {output for node in self.nodes for output in node.output}
            name = wanted
            while name != tensor and (name in made or name in self.constants or name in inputs):
                name += "_"
            if tensor not in made or tensor in found:
                # An input of the graph, or a tensor that is another result as well.
                self.node("Identity", [tensor], name)
            else:
                for node in self.nodes:
                    for names in (node.input, node.output):
                        names[:] = [name if used == tensor else used for used in names]
            found[name] = tensor
        return found

    def model(
        self, inputs: Mapping[str, tuple[int, ...]], outputs: Mapping[str, Sequence[int]]
    ) -> onnx.ModelProto:
        """The graph as a checked model, of inputs and results by name; shapes come without the
        batch, which stays free.
        """
        graph = helper.make_graph(
            self.nodes,
            "student",
            [self._described(name, shape) for name, shape in inputs.items()],
            [self._described(name, shape) for name, shape in outputs.items()],
            list(self.constants.values()),
        )
        opsets = [helper.make_opsetid("", self.opset)]
        if self.domain:
            opsets.append(helper.make_opsetid(self.domain, 1))
        model = helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=helper.find_min_ir_version_for(opsets, ignore_unknown=True),
            **self.producer,
        )
        helper.set_model_props(model, self.properties)
        if model.ByteSize() >= onnx.checker.MAXIMUM_PROTOBUF:
            raise ExportError(
                f"the student takes {model.ByteSize() / 1e9:.1f} GB, and an ONNX file holds "
                "2 GB: quantize it, or choose a smaller teacher"
            )
        onnx.checker.check_model(model, full_check=True)
        return model

    def _described(self, name: str, shape: Sequence[int]) -> onnx.ValueInfoProto:
        batch = 1 if self.dialect.batch == "one" else "batch"
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, *shape])


def positive(name: str, scale: Tensor) -> NDArray[np.float32]:
    """The scale of ``name`` as float32, (O,) or (); checked to be positive and finite."""
    factors = scale.detach().cpu().float().numpy()
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise ExportError(f"{name} has a scale that is not positive and finite")
    return factors.reshape(()) if factors.size == 1 else factors
