"""What an ONNX file costs, whoever wrote it: from its graph alone."""

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import onnx

from archnet.hardware.cost import FLOAT_BITS, Cost, StepCost, live_bytes
from archnet.hardware.onnx_file import AuditError, bodies, name_of, refuse
from archnet.hardware.onnx_graph import (
    ACTIVATIONS,
    MOVES,
    VIEWS,
    OnnxGraph,
    attributes,
    is_activation,
    is_quantization,
    is_setting,
    is_standard,
    open_graph,
    operator_name,
    type_bits,
)
from archnet.hardware.onnx_inputs import Sizes
from archnet.hardware.onnx_products import Multiplication, multiplications, operands

# Of a batch norm; its statistics are no parameters.
_SCALE_AND_SHIFT = (1, 2)


def onnx_cost(
    source: str | os.PathLike[str] | onnx.ModelProto, inputs: Sizes | None = None
) -> Cost[int | None]:
    """The cost of an ONNX model on one sample, at the widths of the values in it.

    Counted are convolutions (transposed ones included), Gemm, MatMul, Einsum and recurrent
    layers, their integer forms, and some of ONNX Runtime's. A value has the bits of the integers
    that it stands for: those of a QuantizeLinear or a Quant node, of the Clip after it, or of the
    note that archnet's own files carry; else those of its type. Moves, ReLUs, max-poolings and
    concatenations hand them on.

    ``weight_bytes`` is what the file stores, with scales and zero points: integers of two bits
    take a byte each where they are stored as INT8, and four where they are floats before a
    Quant or a QuantizeLinear; a batch norm stores four numbers a channel. `student_cost` packs
    integers at their width, and counts no scales and two numbers a channel. A constant that
    several nodes read counts once, with the first.

    Args:
        source: the file, or the model in memory.
        inputs: shapes by input (the name "" is the only one), where the file leaves sizes open.

    Returns:
        Steps are the nodes that are neither activations nor layout moves; ``uncounted`` names the
        operators among them whose work is in no figure. Where the products of a layer are not
        known, because a shape is not or because nobody counts its operator, its MACs and BOPs are
        None, and so are those of the file; ``unknown`` names these layers. The peak of the
        activations is None where any shape is not known.

    Raises:
        AuditError: the file is missing or no valid ONNX model, or the sizes do not fit in it.
        ConfigError: a given shape is not one that the file takes.
    """
    graph = open_graph(source, inputs)
    try:
        return _OnnxCost(graph).cost()
    except AuditError as error:
        refuse(name_of(source), str(error))


class _OnnxCost:
    """One walk along the graph."""

    def __init__(self, graph: OnnxGraph) -> None:
        self.graph = graph
        self._counted: set[str] = set()

    def cost(self) -> Cost[int | None]:
        live = self._live()
        rows: list[StepCost[int | None]] = []
        uncounted: Counter[str] = Counter()
        for index, node in enumerate(self.graph.nodes):
            if is_activation(node) or (is_standard(node) and node.op_type in MOVES):
                continue
            found = multiplications(self.graph, node)
            if not found:
                uncounted.update(_uncounted(node))
            rows.append(self._row(node, found, live[index] if live is not None else None))
        unknown = tuple(row.name for row in rows if row.macs is None)
        return Cost(
            macs=_sum(row.macs for row in rows),
            bops=_sum(row.bops for row in rows),
            parameters=sum(row.parameters for row in rows),
            weight_bytes=sum(row.weight_bytes for row in rows),
            activation_bytes=max(live, default=0) if live is not None else None,
            steps=tuple(rows),
            uncounted=dict(uncounted),
            unknown=unknown,
            inputs={name: self.graph.shapes.get(name, ()) for name in self.graph.inputs},
            batch=self.graph.batch,
        )

    def _row(
        self, node: onnx.NodeProto, found: Sequence[Multiplication] | None, live: int | None
    ) -> StepCost[int | None]:
        constants = [name for name in node.input if name and name in self.graph.constants]
        values = [name for name in node.input if name not in self.graph.constants]
        parameters, weight_bytes = self._stored(node)
        weight_bits = max(map(self.graph.bits, constants), default=FLOAT_BITS)
        read_bits = max(map(self.graph.bits, values), default=FLOAT_BITS)
        macs = bops = None
        if found is not None:
            widths = [(self._weight_bits(node, x), self.graph.bits(x.values)) for x in found]
            macs = sum(item.product.macs for item in found)
            bops = sum(x.product.macs * a * b for x, (a, b) in zip(found, widths, strict=True))
            if widths:
                weight_bits, read_bits = widths[0]
        return StepCost(
            name=node.name or next(filter(None, node.output), node.op_type),
            operator=operator_name(node),
            origin="",
            macs=macs,
            bops=bops,
            parameters=parameters,
            weight_bits=weight_bits,
            activation_bits=read_bits,
            weight_bytes=weight_bytes,
            live_bytes=live,
            products=tuple(item.product for item in found or ()),
        )

    def _weight_bits(self, node: onnx.NodeProto, found: Multiplication) -> int:
        """Bits of a weight; those of a MatMulNBits are packed into bytes."""
        if node.op_type == "MatMulNBits":
            return int(attributes(node).get("bits", 4))
        return self.graph.bits(found.weight)

    def _stored(self, node: onnx.NodeProto) -> tuple[int, int]:
        """Parameters that a node is the first to read, and bytes of them and of their scales."""
        places = operands(node)
        parameters = size = 0
        for index, name in enumerate(node.input):
            if not name or name not in self.graph.constants:
                continue
            if places is None:
                trained = not is_setting(self.graph.element_type(name))
                if not trained:
                    continue
                if node.op_type == "BatchNormalization":
                    trained = index in _SCALE_AND_SHIFT
            else:
                trained = index in places.parameters
            count, stored = self._leaves(name)
            size += stored
            if trained and count and node.op_type == "MatMulNBits":
                count = math.prod(int(attributes(node).get(key, 0)) for key in "KN")
            parameters += count if trained else 0
        return parameters, size

    def _leaves(self, name: str) -> tuple[int, int]:
        """Elements and bytes of what is stored for a constant, with its scales, not counted yet."""
        elements = size = 0
        waiting = [(name, True)]
        while waiting:
            name, counts = waiting.pop()
            if name in self._counted or not name:
                continue
            self._counted.add(name)
            node = self.graph.folded.get(name)
            if node is not None and (is_quantization(node) or self.graph.root(name) != name):
                waiting.append((node.input[0], counts))
                if is_quantization(node):
                    waiting += [(scale, False) for scale in node.input[1:]]
                continue
            if node is not None and node.op_type != "Constant" and name not in self.graph.trained:
                continue  # computed from sizes alone, such as the anchors of a detector
            shape = self.graph.shapes.get(name, (0,))
            count = math.prod(axis or 0 for axis in shape)
            if name in self.graph.sparse:
                count = math.prod(self.graph.sparse[name].values.dims)
            elements += count if counts else 0
            size += math.ceil(count * type_bits(self.graph.element_type(name)) / 8)
        return elements, size

    def _elements(self, name: str) -> int | None:
        """Elements of a value for one sample; None where its shape is not known."""
        shape = self.graph.shapes.get(name)
        if shape is None or None in shape:
            return None
        count = math.prod(size or 0 for size in shape)
        batch = self.graph.batch if name in self.graph.batched else 1
        return count // batch if count % batch == 0 else count

    def _live(self) -> list[int] | None:
        """Bytes in use at each node; None where a shape is not known."""
        graph = self.graph
        readers: Counter[str] = Counter(name for node in graph.nodes for name in node.input)
        ends = {*graph.inputs, *graph.outputs}
        buffer = {name: name for name in graph.inputs}
        for node in graph.nodes:
            source = node.input[0] if node.input else ""
            alone = readers[source] == 1 and source not in ends
            view = is_standard(node) and node.op_type in (*ACTIVATIONS, *VIEWS)
            dequantizes = node.op_type == "DequantizeLinear"
            for index, name in enumerate(node.output):
                shares = index == 0 and source in buffer
                shares = shares and (dequantizes or (alone and (view or is_activation(node))))
                buffer[name] = buffer[source] if shares else name
        buffer.pop("", None)
        size: dict[str, int] = {}
        for name, root in buffer.items():
            count = self._elements(name)
            if count is None:
                return None
            needed = math.ceil(count * graph.bits(name) / 8)
            # Fused, only the narrowest of what shares a buffer is ever stored.
            size[root] = min(needed, size.get(root, needed))
        accesses = [
            [buffer[name] for name in (*node.input, *node.output) if name in buffer]
            for node in graph.nodes
        ]
        kept = [buffer[name] for name in graph.outputs if name in buffer]
        return live_bytes(accesses, size, [buffer[name] for name in graph.inputs], kept)


def _sum(figures: Iterable[int | None]) -> int | None:
    """The sum; None where one is not known."""
    total = 0
    for figure in figures:
        if figure is None:
            return None
        total += figure
    return total


def _uncounted(node: onnx.NodeProto) -> Iterator[str]:
    """The operators of a node that are in no figure: itself, and what multiplies inside of it."""
    yield operator_name(node)
    waiting = list(bodies(node))
    while waiting:
        for inner in waiting.pop().node:
            if operands(inner) is not None:
                yield f"{operator_name(inner)} inside of {operator_name(node)}"
            waiting += bodies(inner)
