"""An ONNX file as audit and cost read it: what computes at run time, and what is known before."""

import os
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from archnet.hardware.onnx_file import infer, load, name_of

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
# These differ from run to run, even on constants.
_RANDOM = ("RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial")
# Shapes are computed for a batch of this size, which no other axis is likely to have.
PROBE = 1009


def read(source: str | os.PathLike[str] | onnx.ModelProto) -> onnx.ModelProto:
    """Load, check and complete a model: functions inlined, shapes inferred.

    Raises:
        AuditError: the file is missing or no valid ONNX model, or larger than is read here.
    """
    model = load(source)
    for item in model.graph.input:
        shape = item.type.tensor_type.shape
        if shape.dim and not shape.dim[0].HasField("dim_value"):
            shape.dim[0].dim_value = PROBE
    del model.graph.value_info[:]
    return infer(model, name_of(source))


class OnnxGraph:
    """The nodes that compute something when the network runs, and what is known of their inputs.

    Constants are initializers and whatever is computed from constants alone; the shape of a value
    is one of them where every axis is known, so that arithmetic on such shapes folds away. What
    depends on values that only a run knows stays.

    Attributes:
        nodes: those that are left.
        constants: names of constants, "" (an optional input that is left out) among them.
        folded: the node behind each constant that is no initializer.
        producer: the node behind each other value.
        shapes: of all values, as far as they can be inferred, the batch being `PROBE` where the
            file leaves it open.
        types: element types of values that are no initializers.
        inputs, outputs: names.
        batch: sizes of the first axes of the inputs.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.initializers = {item.name: item for item in graph.initializer}
        self.constants = {*self.initializers, ""}
        self.constants |= {item.values.name for item in graph.sparse_initializer}
        self.shapes: dict[str, tuple[int | None, ...]] = {
            item.name: tuple(item.dims) for item in graph.initializer
        }
        described = (*graph.input, *graph.value_info, *graph.output)
        for item in described:
            if item.type.tensor_type.HasField("shape"):
                self.shapes[item.name] = tuple(
                    dim.dim_value if dim.HasField("dim_value") else None
                    for dim in item.type.tensor_type.shape.dim
                )
        self.types = {item.name: item.type.tensor_type.elem_type for item in described}
        self.inputs = [item.name for item in graph.input if item.name not in self.constants]
        self.outputs = [item.name for item in graph.output]
        self.batch = {shape[0] for name in self.inputs if (shape := self.shapes.get(name))}
        self.nodes: list[onnx.NodeProto] = []
        self.folded: dict[str, onnx.NodeProto] = {}
        self.producer: dict[str, onnx.NodeProto] = {}
        for node in graph.node:
            if self._folds(node):
                self.constants.update(node.output)
                self.folded.update(dict.fromkeys(node.output, node))
            else:
                self.nodes.append(node)
                self.producer.update(dict.fromkeys(node.output, node))

    def _folds(self, node: onnx.NodeProto) -> bool:
        """Whether nothing of a node is left to do when the network runs."""
        if not is_standard(node) or node.op_type in _RANDOM:
            return False
        if node.op_type in ("Shape", "Size"):
            shape = self.shape(node, 0)
            return shape is not None and None not in shape
        if node.op_type == "Constant":
            return True
        # Control flow has graphs inside, which may read values from outside.
        holds_graphs = any(item.type == onnx.AttributeProto.GRAPH for item in node.attribute)
        return (
            bool(node.input)
            and not holds_graphs
            and all(name in self.constants for name in node.input)
        )

    def constant(self, node: onnx.NodeProto, index: int) -> bool:
        """Whether an input of a node is a constant (or left out)."""
        return index >= len(node.input) or node.input[index] in self.constants

    def shape(self, node: onnx.NodeProto, index: int) -> tuple[int | None, ...] | None:
        """The shape of an input of a node; None where it is not known."""
        return self.shapes.get(node.input[index]) if index < len(node.input) else None

    def stored(self, name: str) -> TensorProto | None:
        """The tensor in the file that a constant is read from, through moves and dequantization."""
        while name not in self.initializers:
            node = self.folded.get(name)
            if node is None:
                return None
            if node.op_type == "Constant":
                value = attributes(node).get("value")
                return value if isinstance(value, TensorProto) else None
            if node.op_type not in ("DequantizeLinear", *MOVES):
                return None
            name = node.input[0]
        return self.initializers[name]

    def stored_value(self, name: str) -> NDArray[Any] | None:
        """The numbers of `stored`; None where they are not in this file."""
        tensor = self.stored(name)
        if tensor is None or tensor.data_location == TensorProto.EXTERNAL:
            return None
        return np.asarray(numpy_helper.to_array(tensor))

    def element_type(self, name: str) -> int:
        """Element type of a value as a reader gets it from memory, through dequantization."""
        node = self.producer.get(name)
        while node is not None and node.op_type in ("DequantizeLinear", *VIEWS):
            name = node.input[0]
            node = self.producer.get(name)
        return self.types.get(name, TensorProto.FLOAT)


def operator_name(node: onnx.NodeProto) -> str:
    """The operator, with its domain where that is not ONNX's own."""
    return node.op_type if is_standard(node) else f"{node.domain}.{node.op_type}"


def is_standard(node: onnx.NodeProto) -> bool:
    """Whether a node is an operator of ONNX itself."""
    return node.domain in ("", "ai.onnx")


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """The attributes that a node states."""
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}
