"""What an ONNX file costs, whoever wrote it: from its graph alone."""

import math
import os
from collections import Counter
from typing import Any

import onnx
from onnx import TensorProto, helper

from archnet.hardware.cost import Cost, Product, StepCost, live_bytes
from archnet.hardware.onnx_file import AuditError
from archnet.hardware.onnx_graph import (
    ACTIVATIONS,
    MOVES,
    VIEWS,
    OnnxGraph,
    attributes,
    is_standard,
    operator_name,
    read,
)

_PACKED_BITS = {"INT2": 2, "UINT2": 2, "INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4}


def onnx_cost(source: str | os.PathLike[str] | onnx.ModelProto) -> Cost:
    """The cost of an ONNX model on one sample, at the widths that are stored in it.

    Counted are Conv, Gemm and MatMul with a batch that comes first. A weight or an activation has
    the bits of its stored type: integers limited to a part of INT8 count as 8 bits. Buffers hold
    tensors as `student_cost` says, and what a DequantizeLinear gives is never stored.

    Args:
        source: the file, or the model in memory.

    Returns:
        Steps are the nodes that are neither activations nor layout moves; ``uncounted`` names the
        operators among them whose work is in no figure. The peak of the activations is None where
        a shape cannot be inferred.

    Raises:
        AuditError: the file is missing or no valid ONNX model.
    """
    return _OnnxCost(read(source)).cost()


class _OnnxCost:
    """One walk along the graph."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = OnnxGraph(model)
        self.batch = next(iter(self.graph.batch)) or 1 if len(self.graph.batch) == 1 else 1

    def cost(self) -> Cost:
        live = self._live()
        rows: list[StepCost] = []
        uncounted: Counter[str] = Counter()
        for index, node in enumerate(self.graph.nodes):
            if is_standard(node) and node.op_type in (*ACTIVATIONS, *MOVES):
                continue
            product = self._product(node) if is_standard(node) else None
            if product is None:
                uncounted[operator_name(node)] += 1
            macs = product.macs if product else 0
            constants = [name for name in node.input if name and name in self.graph.constants]
            stored = [self._stored(name) for name in constants]
            values = [name for name in node.input if name not in self.graph.constants]
            weight_bits = max((bits for _, _, bits in stored), default=32)
            if product and constants:
                weight_bits = stored[0][2]  # the bias behind it is wider
            read_bits = max((_bits(self.graph.element_type(name)) for name in values), default=32)
            rows.append(
                StepCost(
                    name=node.name or node.output[0],
                    operator=operator_name(node),
                    origin="",
                    macs=macs,
                    bops=macs * weight_bits * read_bits,
                    parameters=sum(count for count, _, _ in stored),
                    weight_bits=weight_bits,
                    activation_bits=read_bits,
                    weight_bytes=sum(size for _, size, _ in stored),
                    live_bytes=live[index] if live else 0,
                    products=(product,) if product else (),
                )
            )
        return Cost(
            macs=sum(row.macs for row in rows),
            bops=sum(row.bops for row in rows),
            parameters=sum(row.parameters for row in rows),
            weight_bytes=sum(row.weight_bytes for row in rows),
            activation_bytes=max(live, default=0) if live is not None else None,
            steps=tuple(rows),
            uncounted=dict(uncounted),
        )

    def _elements(self, name: str) -> int | None:
        """Elements of a value for one sample; None where its shape is not known."""
        shape = self.graph.shapes.get(name)
        if shape is None or any(size is None for size in shape):
            return None
        return math.prod(size or 0 for size in shape) // self.batch

    def _product(self, node: onnx.NodeProto) -> Product | None:
        """The matrix product of a node; None where it has none, or of unknown size."""
        shapes = [self.graph.shape(node, index) for index in (0, 1)]
        results = self._elements(node.output[0])
        if any(shape is None or None in shape for shape in shapes) or results is None:
            return None
        left, right = ([size or 0 for size in shape or ()] for shape in shapes)
        if 0 in (*left, *right):
            return None
        if node.op_type == "Conv":
            groups = max(1, attributes(node).get("group", 1))
            filters = right[0] // groups
            return Product(results // right[0], math.prod(right[1:]), filters, groups)
        if node.op_type == "Gemm":
            depth = left[0 if attributes(node).get("transA", 0) else 1]
            filters = right[0 if attributes(node).get("transB", 0) else 1]
            return Product(results // filters, depth, filters)
        if node.op_type == "MatMul" and len(left) > 1 and len(right) > 1:
            depth, filters = right[-2:]
            if self.graph.constant(node, 1) and len(right) == 2:
                return Product(results // filters, depth, filters)
            count = max(1, results // (left[-2] * filters))
            return Product(left[-2], depth, filters, count)
        return None

    def _stored(self, name: str) -> tuple[int, int, int]:
        """(elements, bytes with scales and zero points, bits of an element) of a constant."""
        if name in self.graph.initializers:
            item = self.graph.initializers[name]
            count, bits = math.prod(item.dims), _bits(item.data_type)
            return count, math.ceil(count * bits / 8), bits
        node = self.graph.folded.get(name)
        if node is None:
            return 0, 0, 32  # sparse, or left out
        if node.op_type == "Constant":
            value = attributes(node).get("value")
            if not isinstance(value, TensorProto):
                return 1, 4, 32
            count, bits = math.prod(value.dims), _bits(value.data_type)
            return count, math.ceil(count * bits / 8), bits
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", *MOVES):
            parts = [self._stored(part) for part in node.input if part]
            if node.op_type in MOVES:
                return parts[0]
            return parts[0][0], sum(size for _, size, _ in parts), parts[0][2]
        # Computed once from other constants, and kept.
        count = math.prod(size or 0 for size in self.graph.shapes.get(name, (0,)))
        bits = _bits(self.graph.types.get(name, TensorProto.FLOAT))
        return count, math.ceil(count * bits / 8), bits

    def _live(self) -> list[int] | None:
        """Bytes in use at each node; None where a shape is not known."""
        readers: Counter[str] = Counter(name for n in self.graph.nodes for name in n.input)
        buffer: dict[str, str] = {}

        def root(name: str) -> str:
            while buffer.get(name, name) != name:
                name = buffer[name]
            return name

        for node in self.graph.nodes:
            source = node.input[0] if node.input else ""
            alone = readers[source] == 1 and source not in (*self.graph.inputs, *self.graph.outputs)
            shares = node.op_type in (*ACTIVATIONS, *VIEWS) and alone
            if shares or node.op_type == "DequantizeLinear":
                buffer[node.output[0]] = source
        size: dict[str, int] = {}
        names = {
            *self.graph.inputs,
            *(name for node in self.graph.nodes for name in node.output if name),
        }
        for name in names:
            count = self._elements(name)
            if count is None:
                return None
            needed = math.ceil(count * _bits(self.graph.types.get(name, TensorProto.FLOAT)) / 8)
            # Fused, only the narrowest of what shares a buffer is ever stored.
            size[root(name)] = min(needed, size.get(root(name), needed))
        accesses = [
            [root(n) for n in (*node.input, *node.output) if n and n not in self.graph.constants]
            for node in self.graph.nodes
        ]
        kept = [root(name) for name in self.graph.outputs if name not in self.graph.constants]
        return live_bytes(accesses, size, [root(name) for name in self.graph.inputs], kept)


def _bits(data_type: int) -> int:
    """Bits of an element; packed types have no NumPy type of their size."""
    known = {value: name for name, value in TensorProto.DataType.items()}
    data_type = data_type or TensorProto.FLOAT
    if data_type not in known:
        raise AuditError(f"the model is no valid ONNX model: element type {data_type}")
    dtype: Any = helper.tensor_dtype_to_np_dtype(data_type)
    return _PACKED_BITS.get(known[data_type], 8 * dtype.itemsize)
