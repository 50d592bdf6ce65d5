"""An ONNX file as audit and cost read it: what computes at run time, and what is known before."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from archnet.hardware.onnx_file import (
    AuditError,
    bits_of,
    first_line,
    load,
    name_of,
    refuse,
)
from archnet.hardware.onnx_infer import MICROSOFT, QUANT_DOMAINS, Inference
from archnet.hardware.onnx_inputs import Shape, Sizes, check_size, check_type, settle

# What clips or rounds activations to a grid; it belongs to the operator before it.
ACTIVATIONS = ("Relu", "Clip", "QuantizeLinear", "DequantizeLinear")
MOVES = (
    "Reshape",
    "Transpose",
    "Slice",
    "Split",
    "Pad",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Identity",
)
# Moves that change nothing in memory.
VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")
# These give values that they read, no others: integers stay integers of the same width.
_KEEPS = (
    *MOVES,
    "Relu",
    "Clip",
    "Gather",
    "Expand",
    "Tile",
    "DepthToSpace",
    "SpaceToDepth",
    "MaxPool",
    "GlobalMaxPool",
    "ReduceMax",
    "ReduceMin",
    "Dropout",
)
# So do these, from several inputs.
_JOINS = ("Concat", "Max", "Min")
_QUANTS = ("Quant", "IntQuant", "BipolarQuant")
# These differ from run to run, even on constants.
_RANDOM = ("RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial")
# The metadata of a node in which archnet's own files note the width of the integers that it gives.
WIDTH_KEY = "bits"
# Types of sizes, indices and conditions.
_SETTINGS = ("INT32", "INT64", "UINT32", "UINT64", "BOOL", "STRING")


def open_graph(
    source: str | os.PathLike[str] | onnx.ModelProto, inputs: Sizes | None = None
) -> "OnnxGraph":
    """The graph of a file, for inputs of these sizes.

    Args:
        source: the file, or the model in memory.
        inputs: shapes by input, the name "" for the only one; None: those of the file.

    Raises:
        AuditError: the file is missing or no valid ONNX model, or the sizes do not fit in it.
        ConfigError: a shape is not one that the file takes.
    """
    model = load(source)
    try:
        return OnnxGraph(model, inputs)
    except AuditError as error:
        refuse(name_of(source), str(error))


@dataclass(frozen=True)
class StoredIntegers:
    """The integers that a float value of the file is made from, as they are stored.

    Args:
        kind: their type, such as "int8"; a Quant node may have "int3".
        bits: of each, which a Clip or the file's own notes may narrow.
        scale: name of the constant that holds their scale; "" if the value is the integers.
    """

    kind: str
    bits: int
    scale: str = ""


class OnnxGraph:
    """The nodes that compute something when the network runs, and what is known of their inputs.

    Constants are initializers and whatever is computed from constants alone; the shape of a value
    is one of them where every axis is known, so that arithmetic on such shapes folds away. What
    depends on values that only a run knows stays. Of an If whose condition is a constant only the
    branch that runs is there.

    Attributes:
        nodes: those that are left.
        constants: names of constants, "" (an optional input that is left out) among them.
        folded: the producer of each constant that is not an initializer.
        producer: the producer of each other value.
        shapes: of all values, as far as they can be inferred, for `batch` samples.
        types: element types of values that are no initializers.
        grids: the integers behind each value that stands for some.
        inputs, outputs: names.
        batch: samples of a run: 1 where the file leaves it open.
        batched: names of values that depend on an input with the batch in its shape.
        trained: names of constants with more than sizes and single numbers of the file in them.
        problems: why the results of a node are not known, by its first output.
    """

    def __init__(self, model: onnx.ModelProto, inputs: Sizes | None = None) -> None:
        graph = model.graph
        self._settled = settle(graph, inputs)
        self.batch = self._settled.batch
        self.batched = set(self._settled.batched)
        self._infer = Inference(model.opset_import)
        self.problems = self._infer.problems
        self.initializers: dict[str, TensorProto] = {}
        self.sparse: dict[str, onnx.SparseTensorProto] = {}
        self.constants = {""}
        self.shapes: dict[str, Shape] = {}
        self.types: dict[str, int] = {}
        self.grids: dict[str, StoredIntegers] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.folded: dict[str, onnx.NodeProto] = {}
        self.producer: dict[str, onnx.NodeProto] = {}
        self.trained: set[str] = set()
        self._root: dict[str, str] = {}
        self._store(graph)
        self.inputs = [item.name for item in graph.input if item.name not in self.constants]
        self.outputs = [item.name for item in graph.output]
        for item in graph.input:
            shape = self._settled.shapes.get(item.name)
            if shape is not None:
                self._infer.declare(item.name, item.type.tensor_type.elem_type, shape)
                self._learn(item.name)
        self._declared = {item.name: item for item in (*graph.value_info, *graph.output)}
        for node in graph.node:
            self._visit(node)

    # What is known of values ----------------------------------------------------------------

    def constant(self, node: onnx.NodeProto, index: int) -> bool:
        """Whether an input of a node is a constant (or left out)."""
        return index >= len(node.input) or node.input[index] in self.constants

    def shape(self, node: onnx.NodeProto, index: int) -> Shape | None:
        """The shape of an input of a node; None where it is not known."""
        return self.shapes.get(node.input[index]) if index < len(node.input) else None

    def root(self, name: str) -> str:
        """The constant that a constant is read from, through moves and quantization.

        It is an initializer, or the result of a node that computes one.
        """
        return self._root.get(name, name)

    def stored(self, name: str) -> TensorProto | None:
        """The tensor in the file that a constant is read from; None where it is computed."""
        name = self.root(name)
        if name in self.initializers:
            return self.initializers[name]
        node = self.folded.get(name)
        if node is not None and node.op_type == "Constant" and is_standard(node):
            value = attributes(node).get("value")
            return value if isinstance(value, TensorProto) else None
        return None

    def stored_value(self, name: str) -> NDArray[Any] | None:
        """The numbers of `stored`; None where they are not in this file."""
        tensor = self.stored(name)
        if tensor is None or tensor.data_location == TensorProto.EXTERNAL:
            return None
        try:
            return np.asarray(numpy_helper.to_array(tensor))
        except Exception as error:  # Whatever NumPy says of data that does not fit its type.
            raise AuditError(f"{tensor.name}: {first_line(error)}") from error

    def element_type(self, name: str) -> int:
        """The element type of a value; that of floats where it is not known."""
        if name in self.initializers:
            return self.initializers[name].data_type or TensorProto.FLOAT
        return self.types.get(name) or TensorProto.FLOAT

    def grid(self, name: str) -> StoredIntegers | None:
        """The integers that a value stands for; None where it is a float as far as is known."""
        found = self.grids.get(name)
        if found is None and (kind := type_name(self.element_type(name))).startswith(
            ("int", "uint")
        ):
            return StoredIntegers(kind, type_bits(self.element_type(name)))
        return found

    def bits(self, name: str) -> int:
        """Bits of a value: of the integers behind it, else of its type."""
        found = self.grid(name)
        return found.bits if found is not None else type_bits(self.element_type(name))

    @property
    def quantized(self) -> bool:
        """Whether anything in the file stands for integers of a scale."""
        return any(item.scale for item in self.grids.values())

    # The walk -------------------------------------------------------------------------------

    def _store(self, graph: onnx.GraphProto) -> None:
        """Take in the initializers of a graph."""
        for item in graph.initializer:
            self._infer.constant(item)
            self.initializers[item.name] = item
            self.constants.add(item.name)
            self.shapes[item.name] = tuple(item.dims)
            self._notice(item.name)
        for sparse in graph.sparse_initializer:
            name = sparse.values.name
            check_type(name, sparse.values.data_type)
            check_size(name, tuple(sparse.dims))
            self._infer.declare(name, sparse.values.data_type, tuple(sparse.dims))
            self.sparse[name] = sparse
            self.constants.add(name)
            self._learn(name)
            self._notice(name)

    def _notice(self, name: str) -> None:
        """Note a stored tensor that may be trained."""
        several = any(size != 1 for size in self.shapes.get(name, ()))
        if several and not is_setting(self.element_type(name)):
            self.trained.add(name)

    def _learn(self, name: str) -> None:
        """Take over what the inference knows of a value."""
        shape, kind = self._infer.shape(name), self._infer.element_type(name)
        if shape is not None:
            self.shapes[name] = shape
        if kind:
            self.types[name] = kind

    def _visit(self, node: onnx.NodeProto) -> None:
        branches = [item for item in node.attribute if item.type == onnx.AttributeProto.GRAPH]
        if node.op_type == "If" and is_standard(node):
            condition = self._infer.values.get(node.input[0])
            if condition is not None and condition.size == 1:
                wanted = "then_branch" if bool(condition.reshape(())) else "else_branch"
                for item in branches:
                    if item.name == wanted:
                        self._take(node, item.g)
                return
            self._infer.merge(node, [self._results(item.g) for item in branches])
        self._infer.visit(node)
        folds = self._folds(node)
        if folds:
            self.constants.update(node.output)
            self.folded.update(dict.fromkeys(node.output, node))
        else:
            self.nodes.append(node)
            self.producer.update(dict.fromkeys(node.output, node))
        if any(name in self.batched for name in node.input):
            self.batched.update(node.output)
        for name in filter(None, node.output):
            if name not in self._infer.types:
                self._believe(name)
            self._learn(name)
        if folds and node.op_type == "Constant":
            self._notice(node.output[0])
        elif folds and any(name in self.trained for name in node.input):
            self.trained.update(node.output)
        grid = self._grid(node)
        if grid is not None:
            self.grids.update(dict.fromkeys(filter(None, node.output), grid))
        if folds and node.input and (is_quantization(node) or self._moves(node)):
            self._root.update(dict.fromkeys(node.output, self.root(node.input[0])))

    def _folds(self, node: onnx.NodeProto) -> bool:
        """Whether nothing of a node is left to do when the network runs."""
        if node.op_type in _RANDOM or not (is_standard(node) or is_quantization(node)):
            return False
        if node.op_type in ("Shape", "Size"):
            name = node.output[0]
            return name in self._infer.values and name not in self._infer.partial
        if node.op_type == "Constant":
            return True
        # Control flow has graphs inside, which may read values from outside.
        holds_graphs = any(item.type == onnx.AttributeProto.GRAPH for item in node.attribute)
        return (
            bool(node.input)
            and not holds_graphs
            and all(name in self.constants for name in node.input)
        )

    def _believe(self, name: str) -> None:
        """Take over what the file says of a value of which nothing could be inferred."""
        item = self._declared.get(name)
        shape = self._settled.dims(item) if item is not None else None
        if item is not None and shape is not None:
            self._infer.declare(name, item.type.tensor_type.elem_type, shape)

    def _keeps(self, node: onnx.NodeProto) -> bool:
        return is_standard(node) and node.op_type in _KEEPS

    def _moves(self, node: onnx.NodeProto) -> bool:
        return is_standard(node) and node.op_type in (*MOVES, "Clip")

    def _grid(self, node: onnx.NodeProto) -> StoredIntegers | None:
        """The integers that the results of a node stand for."""
        grid = self._grid_before_notes(node)
        noted = next((item.value for item in node.metadata_props if item.key == WIDTH_KEY), "")
        if grid is None or not (noted.isdecimal() and len(noted) < 4):
            return grid
        return replace(grid, bits=int(noted)) if 0 < int(noted) <= _digits(grid.kind) else grid

    def _grid_before_notes(self, node: onnx.NodeProto) -> StoredIntegers | None:
        if is_quant(node):
            return self._quant(node)
        if is_quantization(node):
            quantizes = node.op_type == "QuantizeLinear"
            kept = node.output[0] if quantizes else node.input[0]
            found = self.grid(kept)
            return found and replace(found, scale=node.input[1])
        if self._keeps(node) and node.input:
            found = self.grid(node.input[0])
            if found is not None and node.op_type == "Clip":
                return replace(found, bits=self._clipped(node, found.bits))
            return found
        if is_standard(node) and (node.op_type in _JOINS or node.op_type == "Where"):
            parts = [self.grid(name) for name in node.input[int(node.op_type == "Where") :]]
            known = [part for part in parts if part is not None]
            if known and len(known) == len(parts):
                return max(known, key=lambda part: part.bits)
        return None

    def _clipped(self, node: onnx.NodeProto, bits: int) -> int:
        """Bits of integers behind a Clip of them."""
        if not type_name(self.element_type(node.input[0])).startswith(("int", "uint")):
            return bits
        bounds = [
            self._infer.values.get(name) for name in node.input[1:3] if name in self.constants
        ]
        if len(bounds) != 2 or any(bound is None or bound.size != 1 for bound in bounds):
            return bits
        low, high = (int(np.asarray(bound).reshape(())) for bound in bounds)
        return min(bits, max(1, (high - low).bit_length()))

    def _quant(self, node: onnx.NodeProto) -> StoredIntegers | None:
        """The integers of a Quant node."""
        scale = node.input[1] if len(node.input) > 1 else ""
        if node.op_type == "BipolarQuant":
            return StoredIntegers("int1", 1, scale)
        width = self._infer.values.get(node.input[3]) if len(node.input) > 3 else None
        if width is None or width.size != 1 or not 1 <= float(width.reshape(())) <= 64:
            return None
        bits = int(np.ceil(float(width.reshape(()))))
        signed = attributes(node).get("signed", 1)
        return StoredIntegers(f"{'' if signed else 'u'}int{bits}", bits, scale)

    # Branches -------------------------------------------------------------------------------

    def _take(self, node: onnx.NodeProto, branch: onnx.GraphProto) -> None:
        """Put a branch of an If in its place."""
        inside, names = _renamed(branch, f"{node.name or node.output[0]}//", node.output)
        self._store(inside)
        for item in inside.node:
            self._visit(item)
        for name, output in zip(names, node.output, strict=False):
            if name != output and output:
                self._visit(helper.make_node("Identity", [name], [output], name=node.name))

    def _results(self, branch: onnx.GraphProto) -> list[str]:
        """Infer what a branch gives, without taking it in."""
        inside, names = _renamed(branch, f"{len(self._infer.types)}//", ())
        for tensor in inside.initializer:
            self._infer.constant(tensor)
        for item in inside.node:
            nested = [x.g for x in item.attribute if x.type == onnx.AttributeProto.GRAPH]
            if item.op_type == "If":
                self._infer.merge(item, [self._results(graph) for graph in nested])
            self._infer.visit(item)
        return names


def _renamed(
    branch: onnx.GraphProto, prefix: str, outputs: Sequence[str]
) -> tuple[onnx.GraphProto, list[str]]:
    """A branch whose own values have names of their own, and the names of what it gives.

    What it gives is named as ``outputs`` say, where a node of it gives that once.
    """
    inside = onnx.GraphProto()
    inside.CopyFrom(branch)
    made = {name for node in inside.node for name in node.output if name}
    own = {*made, *(item.name for item in inside.initializer)}
    own |= {item.values.name for item in inside.sparse_initializer}
    names = {name: prefix + name for name in own}
    given = [item.name for item in inside.output]
    for name, output in zip(given, outputs, strict=False):
        if name in made and output and given.count(name) == 1:
            names[name] = output
    _rename(inside, names)
    return inside, [names.get(name, name) for name in given]


def _rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    for item in graph.initializer:
        item.name = names.get(item.name, item.name)
    for sparse in graph.sparse_initializer:
        sparse.values.name = names.get(sparse.values.name, sparse.values.name)
    for node in graph.node:
        for values in (node.input, node.output):
            values[:] = [names.get(name, name) for name in values]
        for attribute in node.attribute:
            for nested in (attribute.g, *attribute.graphs):
                if nested.node or nested.output:
                    _rename(nested, names)
    for output in graph.output:
        output.name = names.get(output.name, output.name)


def operator_name(node: onnx.NodeProto) -> str:
    """The operator, with its domain where that is not ONNX's own."""
    return node.op_type if is_standard(node) else f"{node.domain}.{node.op_type}"


def is_standard(node: onnx.NodeProto) -> bool:
    """Whether a node is an operator of ONNX itself."""
    return node.domain in ("", "ai.onnx")


def is_quant(node: onnx.NodeProto) -> bool:
    """Whether a node rounds floats to integers times a scale, and gives these as floats."""
    return node.domain in QUANT_DOMAINS and node.op_type in _QUANTS and _has_scale(node)


def is_quantization(node: onnx.NodeProto) -> bool:
    """Whether a node turns floats into integers of a scale, or back."""
    linear = node.op_type in ("QuantizeLinear", "DequantizeLinear")
    known = is_standard(node) or node.domain == MICROSOFT
    return is_quant(node) or (linear and known and _has_scale(node))


def _has_scale(node: onnx.NodeProto) -> bool:
    """Whether a node has the inputs of a quantization; nobody checks those of other domains."""
    return len(node.input) > 1 and len(node.output) > 0


def is_activation(node: onnx.NodeProto) -> bool:
    """Whether a node clips or rounds activations to a grid."""
    return is_quantization(node) or (is_standard(node) and node.op_type in ACTIVATIONS)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """The attributes that a node states."""
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def _digits(kind: str) -> int:
    return int(kind.lstrip("uint"))


def type_name(element_type: int) -> str:
    """The name of an element type: float, int8."""
    return TensorProto.DataType.Name(element_type).lower()


def is_setting(element_type: int) -> bool:
    """Whether a type is that of sizes, indices and conditions, which nobody trains."""
    return TensorProto.DataType.Name(element_type) in _SETTINGS


def type_bits(element_type: int) -> int:
    """Bits of an element; packed types have no NumPy type of their size."""
    name = TensorProto.DataType.Name(element_type)
    if name == "UNDEFINED":
        return 32
    return bits_of(element_type)
