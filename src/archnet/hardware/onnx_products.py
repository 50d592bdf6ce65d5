"""The matrix products that the nodes of an ONNX file compute."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from archnet.hardware.cost import Product
from archnet.hardware.onnx_file import AuditError, bodies
from archnet.hardware.onnx_graph import OnnxGraph, attributes, is_standard
from archnet.hardware.onnx_infer import MICROSOFT

# Operators of other makers whose names say that they multiply matrices.
_MULTIPLIERS = ("attention", "conv", "einsum", "gemm", "gru", "lstm", "matmul", "moe", "rnn")
_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@dataclass(frozen=True)
class Operands:
    """Where a node has what it multiplies, as numbers of its inputs.

    Args:
        values, weight: the operands.
        parameters: all inputs that hold trained numbers where they are constants; others are
            scales, zero points and sizes.
        state: the second weight of a recurrent layer, by which its state is multiplied.
    """

    values: int
    weight: int
    parameters: tuple[int, ...]
    state: int | None = None

    @property
    def multiplied(self) -> tuple[int, ...]:
        """All operands."""
        return tuple(x for x in (self.values, self.weight, self.state) if x is not None)


@dataclass(frozen=True)
class Multiplication:
    """A product of one sample, and the names of what it reads and of its weight."""

    product: Product
    values: str
    weight: str


_PLAIN = Operands(0, 1, (0, 1, 2))
_RECURRENT = Operands(0, 1, (1, 2, 3, 7), state=2)
_OPERANDS = {
    "Conv": _PLAIN,
    "ConvTranspose": _PLAIN,
    "DeformConv": Operands(0, 1, (1, 3)),
    "ConvInteger": Operands(0, 1, (0, 1)),
    "QLinearConv": Operands(0, 3, (3, 8)),
    "Gemm": _PLAIN,
    "MatMul": Operands(0, 1, (0, 1)),
    "MatMulInteger": Operands(0, 1, (0, 1)),
    "QLinearMatMul": Operands(0, 3, (0, 3)),
    "LSTM": _RECURRENT,
    "GRU": _RECURRENT,
    "RNN": _RECURRENT,
    "Einsum": Operands(0, 1, (0, 1)),
    "Attention": Operands(0, 1, ()),
}
_OPERANDS_OF_MICROSOFT = {
    "FusedConv": _PLAIN,
    "FusedGemm": _PLAIN,
    "FusedMatMul": Operands(0, 1, (0, 1)),
    "TransposeMatMul": Operands(0, 1, (0, 1)),
    "MatMulIntegerToFloat": Operands(0, 1, (0, 1, 6)),
    "DynamicQuantizeMatMul": Operands(0, 1, (0, 1, 4)),
    "MatMulNBits": Operands(0, 1, (1,)),
    "QGemm": Operands(0, 3, (3, 6)),
}
Sizes = list[int]


def operands(node: onnx.NodeProto) -> Operands | None:
    """Where a node has what it multiplies; None where it multiplies no matrices."""
    if is_standard(node):
        return _OPERANDS.get(node.op_type)
    return _OPERANDS_OF_MICROSOFT.get(node.op_type) if node.domain == MICROSOFT else None


def multiplications(graph: OnnxGraph, node: onnx.NodeProto) -> Sequence[Multiplication] | None:
    """The products of a node for one sample, () where it has none; None if they are not known.

    Raises:
        AuditError: the shapes of the node's inputs do not go together.
    """
    places = operands(node)
    if places is None:
        return None if _multiplies_somehow(graph, node) else ()
    if len(node.input) <= max(places.values, places.weight) or not node.output:
        return () if node.op_type == "Einsum" else None
    names = node.input[places.values], node.input[places.weight]
    left, right = (graph.shapes.get(name) for name in names)
    if left is None or right is None or None in left or None in right:
        return None
    problem = graph.problems.get(node.output[0])
    if problem is not None:
        raise _misfit(node, problem)
    find = _FINDERS[node.op_type]
    found = find(graph, node, [size or 0 for size in left], [size or 0 for size in right])
    if found is None:
        return None
    if any(name in graph.batched for name in node.input):
        found = [_of_one(product, graph.batch) for product in found]
    if names[0] in graph.constants and names[1] not in graph.constants:
        # The weight is on the left: what it gives is the transpose of a product with it on the
        # right.
        names = names[1], names[0]
        found = [Product(p.filters, p.depth, p.positions, p.count) for p in found]
    weights = [names[1], *(() if places.state is None else node.input[2:3])]
    return [
        Multiplication(product, names[0], weight)
        for product, weight in zip(found, weights, strict=False)  # there may be none
        if product.macs
    ]


def _multiplies_somehow(graph: OnnxGraph, node: onnx.NodeProto) -> bool:
    """Whether a node of another maker, or one with graphs inside, may multiply matrices."""
    for body in bodies(node):
        for inner in body.node:
            if operands(inner) is not None or _multiplies_somehow(graph, inner):
                return True
    if is_standard(node):
        return False
    if any(word in node.op_type.lower() for word in _MULTIPLIERS):
        return True
    known = node.domain == MICROSOFT and node.output and node.output[0] in graph.shapes
    weights = (graph.shapes.get(name) for name in node.input if name in graph.initializers)
    return not known and any(len(shape or ()) > 1 for shape in weights)


def _misfit(node: onnx.NodeProto, why: str) -> AuditError:
    return AuditError(f"node {node.name or node.output[0]} ({node.op_type}): {why}")


def _of_one(product: Product, batch: int) -> Product:
    """What one sample has of a product for a batch."""
    positions, depth, filters, count = (
        product.positions,
        product.depth,
        product.filters,
        product.count,
    )
    if positions % batch == 0:
        return Product(positions // batch, depth, filters, count)
    if count % batch == 0:
        return Product(positions, depth, filters, count // batch)
    if filters % batch == 0:
        return Product(positions, depth, filters // batch, count)
    return product


_Finder = Callable[[OnnxGraph, onnx.NodeProto, Sizes, Sizes], "Sequence[Product] | None"]
_FINDERS: dict[str, _Finder] = {}


def _finds(*operators: str) -> Callable[[_Finder], _Finder]:
    def register(find: _Finder) -> _Finder:
        _FINDERS.update(dict.fromkeys(operators, find))
        return find

    return register


@_finds("Conv", "ConvInteger", "QLinearConv", "FusedConv", "DeformConv")
def _convolution(
    graph: OnnxGraph, node: onnx.NodeProto, left: Sizes, right: Sizes
) -> Sequence[Product] | None:
    groups = _groups(node, left, right)
    result = graph.shapes.get(node.output[0])
    if right[0] % groups or left[1] != right[1] * groups:
        raise _misfit(node, f"its weight {_text(right)} does not fit {left[1]} channels")
    if result is None or None in result:
        return None
    if not right[0]:
        return ()
    positions = math.prod(size or 0 for size in result) // right[0]
    return [Product(positions, math.prod(right[1:]), right[0] // groups, groups)]


@_finds("ConvTranspose")
def _transposed(
    graph: OnnxGraph, node: onnx.NodeProto, left: Sizes, right: Sizes
) -> Sequence[Product] | None:
    """Every input pixel is multiplied by all of its filter."""
    groups = _groups(node, left, right)
    if left[1] != right[0] or right[0] % groups:
        raise _misfit(node, f"its weight {_text(right)} does not fit {left[1]} channels")
    positions = left[0] * math.prod(left[2:])
    return [Product(positions, math.prod(right[1:]), right[0] // groups, groups)]


def _groups(node: onnx.NodeProto, left: Sizes, right: Sizes) -> int:
    groups = attributes(node).get("group", 1)
    if len(right) < 3 or len(left) != len(right):
        raise _misfit(node, f"its weight {_text(right)} does not fit an input {_text(left)}")
    if groups < 1:
        raise _misfit(node, f"it has {groups} groups")
    return int(groups)


@_finds("Gemm", "FusedGemm", "QGemm")
def _gemm(
    graph: OnnxGraph, node: onnx.NodeProto, left: Sizes, right: Sizes
) -> Sequence[Product] | None:
    if len(left) != 2 or len(right) != 2:
        raise _misfit(node, f"it multiplies {_text(left)} by {_text(right)}")
    stated = attributes(node)
    rows, depth = reversed(left) if stated.get("transA", 0) else left
    inner, filters = reversed(right) if stated.get("transB", 0) else right
    if depth != inner:
        raise _misfit(node, f"it multiplies {_text(left)} by {_text(right)}")
    return [Product(rows, depth, filters)]


@_finds(
    "MatMul",
    "MatMulInteger",
    "QLinearMatMul",
    "FusedMatMul",
    "TransposeMatMul",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
)
def _matmul(
    graph: OnnxGraph, node: onnx.NodeProto, left: Sizes, right: Sizes
) -> Sequence[Product] | None:
    if not left or not right:
        raise _misfit(node, "it multiplies a number without axes")
    stated = attributes(node) if not is_standard(node) else {}
    if stated.get("transBatchA") or stated.get("transBatchB"):
        return None
    left = [1, *left] if len(left) == 1 else left
    right = [*right, 1] if len(right) == 1 else right
    if stated.get("transA"):
        left = [*left[:-2], left[-1], left[-2]]
    if stated.get("transB"):
        right = [*right[:-2], right[-1], right[-2]]
    (rows, depth), (inner, filters) = left[-2:], right[-2:]
    outer = _broadcast(left[:-2], right[:-2])
    if depth != inner or outer is None:
        raise _misfit(node, f"it multiplies {_text(left)} by {_text(right)}")
    if math.prod(right[:-2]) == 1:
        return [Product(math.prod(outer) * rows, depth, filters)] if math.prod(outer) else ()
    return [Product(rows, depth, filters, math.prod(outer))]


@_finds("MatMulNBits")
def _packed(
    graph: OnnxGraph, node: onnx.NodeProto, left: Sizes, right: Sizes
) -> Sequence[Product] | None:
    stated = attributes(node)
    depth, filters = int(stated.get("K", 0)), int(stated.get("N", 0))
    if not left or left[-1] != depth or depth < 1 or filters < 1:
        raise _misfit(node, f"it multiplies {_text(left)} by {depth}x{filters}")
    return [Product(math.prod(left[:-1]), depth, filters)]


@_finds("LSTM", "GRU", "RNN")
def _recurrent(
    graph: OnnxGraph, node: onnx.NodeProto, left: Sizes, right: Sizes
) -> Sequence[Product] | None:
    """What is read, and the state before, times the weights of all gates."""
    hidden_weight = graph.shape(node, 2)
    if hidden_weight is None or None in hidden_weight:
        return None
    state = [size or 0 for size in hidden_weight]
    gates = _GATES[node.op_type]
    if [len(left), len(right), len(state)] != [3, 3, 3] or [right[0], right[1]] != state[:2]:
        raise _misfit(node, f"its weights {_text(right)} and {_text(state)} do not fit")
    if left[2] != right[2] or right[1] != gates * state[2]:
        raise _misfit(node, f"its weight {_text(right)} does not fit an input {_text(left)}")
    steps, samples = left[:2]
    if attributes(node).get("layout", 0):
        steps, samples = samples, steps
    return [
        Product(steps * samples, right[2], right[1], right[0]),
        Product(samples, state[2], state[1], state[0] * steps),
    ]


@_finds("Einsum")
def _einsum(
    graph: OnnxGraph, node: onnx.NodeProto, left: Sizes, right: Sizes
) -> Sequence[Product] | None:
    """A sum over axes that both operands have; axes of one alone are summed before."""
    text = attributes(node)["equation"].decode(errors="replace").replace(" ", "")
    terms, arrow, output = text.partition("->")
    inputs = terms.split(",")
    if len(inputs) != 2 or len(node.input) != 2 or not arrow or "." in text:
        return None
    sizes: dict[str, int] = {}
    for term, shape in zip(inputs, (left, right), strict=True):
        if len(term) != len(shape) or len(set(term)) != len(term):
            return None
        for axis, size in zip(term, shape, strict=True):
            sizes[axis] = max(size, sizes.get(axis, 0))
    first, second = map(set, inputs)
    product = {
        "positions": (first - second) & set(output),
        "depth": (first & second) - set(output),
        "filters": (second - first) & set(output),
        "count": first & second & set(output),
    }
    if not product["depth"]:
        return ()  # no sum: as a Mul
    return [Product(**{key: math.prod(sizes[a] for a in some) for key, some in product.items()})]


@_finds("Attention")
def _attention(
    graph: OnnxGraph, node: onnx.NodeProto, left: Sizes, right: Sizes
) -> Sequence[Product] | None:
    """Scores and their sums of values: nobody counts them here."""
    return None


def _broadcast(left: Sizes, right: Sizes) -> Sizes | None:
    """The common shape of two; None where they do not go together."""
    length = max(len(left), len(right))
    pairs = zip([1] * (length - len(left)) + left, [1] * (length - len(right)) + right, strict=True)
    found = []
    for a, b in pairs:
        if a != b and 1 not in (a, b):
            return None
        found.append(b if a == 1 else a)
    return found


def _text(shape: Sequence[Any]) -> str:
    return "x".join(map(str, shape)) or "without axes"
