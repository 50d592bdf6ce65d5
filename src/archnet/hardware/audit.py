"""Is a file pure? Judged on the nodes of the ONNX graph, whoever wrote it."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx

from archnet.config import pair
from archnet.hardware.onnx_graph import (
    ACTIVATIONS,
    MOVES,
    AuditError,
    OnnxGraph,
    attributes,
    is_quantization,
    is_standard,
    open_graph,
    operator_name,
    type_name,
)
from archnet.hardware.onnx_inputs import Sizes
from archnet.hardware.onnx_products import operands
from archnet.hardware.target import Layer, Target

__all__ = ["Audit", "AuditError", "Violation", "audit"]

# Operators that are what they are, whatever they read.
PLAIN = {
    "Concat": "concat",
    "Softmax": "softmax",
    "LayerNormalization": "layernorm",
    "Sub": "sub",
    "Mul": "mul",
    "Div": "div",
    "Max": "maximum",
    "Min": "minimum",
    "Abs": "abs",
    "Exp": "exp",
    "Log": "log",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "HardSigmoid": "hardsigmoid",
    "HardSwish": "hardswish",
    "Gelu": "gelu",
    "LeakyRelu": "leaky_relu",
    "PRelu": "prelu",
    "Elu": "elu",
    "Erf": "erf",
    "Sqrt": "sqrt",
    "Pow": "pow",
    "Cast": "cast",
    "Equal": "equal",
    "Where": "where",
    "Expand": "expand",
    "ReduceSum": "reduce_sum",
    "Softplus": "softplus",
    "DepthToSpace": "depth_to_space",
    "SpaceToDepth": "space_to_depth",
}


@dataclass(frozen=True)
class Violation:
    """A node outside the target."""

    node: str
    operator: str
    reason: str

    def __str__(self) -> str:
        return f"{self.node} ({self.operator}): {self.reason}"


@dataclass(frozen=True)
class Audit:
    """What a file is made of.

    ``counts`` has the number of nodes of every operator of the target, and of activations;
    ``moves`` lists the layout moves by type, which are allowed; ``violations`` is all the rest.
    ``notes`` tell what could not be judged.
    """

    target: str
    violations: tuple[Violation, ...]
    counts: dict[str, int]
    moves: dict[str, list[str]]
    notes: tuple[str, ...] = ()

    @property
    def pure(self) -> bool:
        return not self.violations

    def summary(self) -> dict[str, Any]:
        """As plain data, with the number of moves of each type for their names."""
        return {
            "target": self.target,
            "pure": self.pure,
            "violations": [asdict(violation) for violation in self.violations],
            "counts": dict(self.counts),
            "moves": {operator: len(names) for operator, names in self.moves.items()},
            "notes": list(self.notes),
        }

    def groups(self) -> dict[tuple[str, str], list[str]]:
        """The names of the nodes outside the target, by their operator and what is wrong."""
        found: dict[tuple[str, str], list[str]] = {}
        for violation in self.violations:
            found.setdefault((violation.operator, violation.reason), []).append(violation.node)
        return found


def audit(
    model: str | os.PathLike[str] | onnx.ModelProto,
    hardware: str | Target | Any = "arch5",
    inputs: Sizes | None = None,
) -> Audit:
    """Judge an ONNX file by what a target runs.

    Args:
        model: the file, or the model in memory.
        hardware: a target, its name, or a config with its fields.
        inputs: shapes by input (the name "" is the only one), where the file leaves sizes open.

    Raises:
        AuditError: the file is missing or no valid ONNX model, or the sizes do not fit in it.
        ConfigError: there is no such target, or a given shape is not one that the file takes.
    """
    target = Target.of(hardware)
    graph = open_graph(model, inputs)
    counts: dict[str, int] = {}
    moves: dict[str, list[str]] = {}
    violations = []
    for node in graph.nodes:
        label = node.name or f"{node.op_type} -> {', '.join(node.output)}"
        operator, reason = _judge(graph, node, target)
        reason = reason or next(_numbers(graph, node, target), "")
        if reason:
            violations.append(Violation(label, node.op_type, reason))
        elif operator == "move":
            moves.setdefault(node.op_type, []).append(label)
        else:
            counts[operator] = counts.get(operator, 0) + 1
    return Audit(target.name, tuple(violations), counts, moves, tuple(_notes(graph, target)))


Verdict = tuple[str, str]  # The operator that a node is, and what speaks against it ("" nothing).
_JUDGES: dict[str, Callable[[OnnxGraph, onnx.NodeProto, Target], Verdict]] = {}


def _judges(*operators: str) -> Callable[..., Any]:
    def register(judge: Callable[[OnnxGraph, onnx.NodeProto, Target], Verdict]) -> Any:
        _JUDGES.update(dict.fromkeys(operators, judge))
        return judge

    return register


def _judge(graph: OnnxGraph, node: onnx.NodeProto, target: Target) -> Verdict:
    if is_quantization(node):
        return _activation(graph, node, target)
    if not is_standard(node) or node.op_type not in _JUDGES:
        return "", f"{operator_name(node)} is not an operator of {target.name}"
    return _JUDGES[node.op_type](graph, node, target)


def _notes(graph: OnnxGraph, target: Target) -> Iterator[str]:
    quantized = any(
        node.op_type in ("QuantizeLinear", "DequantizeLinear")
        for node in (*graph.nodes, *graph.folded.values())
    )
    if not quantized and (target.weight_types or target.act_types):
        yield f"the file is float: the types and scales of {target.name} are not judged"
    if any(node.op_type.startswith("QLinear") for node in graph.nodes):
        yield "integer operators are not looked into: quantize in QDQ format"
    if any(node.op_type == "Shape" for node in graph.nodes):
        yield "arithmetic on sizes folds away where the inputs have fixed ones: export with them"


@_judges(*MOVES)
def _move(graph: OnnxGraph, node: onnx.NodeProto, target: Target) -> Verdict:
    if not all(graph.constant(node, index) for index in range(1, len(node.input))):
        return "move", "its shape or its bounds are computed at run time"
    return "move", ""


@_judges("Gather")
def _gather(graph: OnnxGraph, node: onnx.NodeProto, target: Target) -> Verdict:
    """With constant indices it moves values; else it looks them up."""
    return ("move", "") if graph.constant(node, 1) else target.judge(Layer("gather"))


@_judges("Dropout")
def _dropout(graph: OnnxGraph, node: onnx.NodeProto, target: Target) -> Verdict:
    """Outside of training it is the identity."""
    mode = node.input[2] if len(node.input) > 2 else ""
    value = graph.stored_value(mode) if mode else np.False_
    if value is None or bool(value):
        return "", "it is in training mode, or may be"
    return "move", ""


@_judges("Shape", "Size")
def _shape(graph: OnnxGraph, node: onnx.NodeProto, target: Target) -> Verdict:
    return "", "it reads a size that the file leaves open, or that depends on the data"


@_judges(*ACTIVATIONS)
def _activation(graph: OnnxGraph, node: onnx.NodeProto, target: Target) -> Verdict:
    if not all(graph.constant(node, index) for index in range(1, len(node.input))):
        return "activation", "its bounds or its scale are computed at run time"
    return "activation", ""


@_judges("Conv", "ConvTranspose")
def _convolution(graph: OnnxGraph, node: onnx.NodeProto, target: Target) -> Verdict:
    weight = graph.shape(node, 1)
    if not (graph.constant(node, 1) and graph.constant(node, 2)) or weight is None:
        return "", "its weight or bias is computed at run time"
    stated = attributes(node)
    groups = int(stated.get("group", 1))
    # (O, I / groups, ...), transposed (I, O / groups, ...).
    outer, inner = (size or 0 for size in weight[:2])
    kind = "conv" if node.op_type == "Conv" else "conv_transpose"
    return target.judge(
        Layer(
            kind,
            **_window(node, tuple(size or 0 for size in weight[2:])),
            groups=groups,
            channels=max(outer, inner * groups),
            weight_sum=_weight_sum(graph, node.input[1], 0) if kind == "conv" else None,
        )
    )


def _window(node: onnx.NodeProto, kernel: tuple[int, ...]) -> dict[str, Any]:
    stated = attributes(node)
    ones = (1,) * len(kernel)
    return {
        "kernel": kernel,
        "stride": tuple(stated.get("strides", ones)),
        "dilation": tuple(stated.get("dilations", ones)),
        "padded": any(stated.get("pads", ())) or b"SAME" in stated.get("auto_pad", b""),
    }


def _weight_sum(graph: OnnxGraph, name: str, axis: int) -> int | None:
    """The largest sum of magnitudes of the integers behind one output; ``axis`` counts outputs."""
    node = graph.folded.get(name)
    values = graph.stored_value(name) if node is not None else None
    if values is None or values.dtype.kind not in "iu" or values.ndim < 2:
        return None
    rows = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
    return int(np.abs(rows.astype(np.int64)).sum(1).max())


@_judges("MaxPool", "AveragePool", "GlobalAveragePool")
def _pool(graph: OnnxGraph, node: onnx.NodeProto, target: Target) -> Verdict:
    if node.op_type == "GlobalAveragePool":
        shape = graph.shape(node, 0) or ()
        return target.judge(Layer("averagepool", kernel=tuple(size or 1 for size in shape[2:])))
    kind = "maxpool" if node.op_type == "MaxPool" else "averagepool"
    if len(node.output) > 1:
        return kind, "it gives indices as well"
    return target.judge(Layer(kind, **_window(node, tuple(attributes(node)["kernel_shape"]))))


@_judges("ReduceMean")
def _mean(graph: OnnxGraph, node: onnx.NodeProto, target: Target) -> Verdict:
    if not graph.constant(node, 1):
        return "mean", "its axes are computed at run time"
    return target.judge(Layer("mean"))


@_judges("BatchNormalization")
def _batch_norm(graph: OnnxGraph, node: onnx.NodeProto, target: Target) -> Verdict:
    if not all(graph.constant(node, index) for index in range(1, 5)):
        return "batchnorm", "its statistics are computed at run time"
    if attributes(node).get("training_mode", 0):
        return "batchnorm", "it is in training mode"
    return target.judge(Layer("batchnorm"))


@_judges(*PLAIN)
def _plain(graph: OnnxGraph, node: onnx.NodeProto, target: Target) -> Verdict:
    return target.judge(Layer(PLAIN[node.op_type]))


@_judges("Gemm", "MatMul")
def _fully_connected(graph: OnnxGraph, node: onnx.NodeProto, target: Target) -> Verdict:
    constant = [graph.constant(node, index) for index in (0, 1)]
    if not any(constant):
        return target.judge(Layer("matmul"))
    if not graph.constant(node, 2) or not _is_vector(graph.shape(node, 2)):
        return "fully_connected", "its bias is no constant vector"
    weight, features = (0, 1) if constant[0] else (1, 0)
    shape = graph.shape(node, weight) or ()
    if len(shape) > 2:
        return "fully_connected", "its weight differs from position to position"
    outputs = int(attributes(node).get("transB", 0) == 0) if weight == 1 else 0
    layer = Layer(
        "fully_connected",
        channels=max((size or 1 for size in shape), default=1),
        weight_sum=_weight_sum(graph, node.input[weight], outputs),
    )
    operator, reason = target.judge(layer)
    if reason or target.fc_per_position:
        return operator, reason
    read_shape = graph.shape(node, features)
    if read_shape is None or len(read_shape) != 2 or read_shape[0] != graph.batch:
        known = "several rows" if read_shape else "values of unknown shape"
        return operator, f"it reads {known}; {target.name} wants one row for each sample"
    return operator, ""


@_judges("Add")
def _add(graph: OnnxGraph, node: onnx.NodeProto, target: Target) -> Verdict:
    constant = [graph.constant(node, index) for index in (0, 1)]
    if any(constant) and _is_bias(graph, node, constant.index(True)):
        return "bias", ""
    operator, reason = target.judge(Layer("add"))
    if not reason:
        return operator, ""
    if any(constant):
        return "", "addition of a constant that is no bias right behind a MatMul with a weight"
    return "", "addition of two activations"


def _is_bias(graph: OnnxGraph, node: onnx.NodeProto, index: int) -> bool:
    """Whether an addition of a constant is the bias of the MatMul with a weight before it."""
    producer = graph.producer.get(node.input[1 - index])
    return (
        producer is not None
        and producer.op_type == "MatMul"
        and (graph.constant(producer, 0) or graph.constant(producer, 1))
        and _is_vector(graph.shape(node, index))
    )


def _is_vector(shape: Sequence[int | None] | None) -> bool:
    """Whether at most one axis is longer than one; so is what was left out."""
    return sum(size != 1 for size in shape or ()) <= 1


# Types and scales ---------------------------------------------------------------------------


def _numbers(graph: OnnxGraph, node: onnx.NodeProto, target: Target) -> Iterator[str]:
    """What speaks against the types and scales of a node, where a file is quantized."""
    if is_quantization(node) and node.op_type != "DequantizeLinear":
        yield from _activation_numbers(graph, node, target)
    places = operands(node)
    if places is None or not graph.quantized:
        return
    found = [node.input[index] for index in places.multiplied if index < len(node.input)]
    weights = [name for name in found if name in graph.constants]
    values = [name for name in found if name not in graph.constants]
    for name in weights:
        yield from _weight_numbers(graph, name, target)
    kinds = {_kind(graph, name): name for name in values}
    for kind, name in kinds.items():
        if target.act_types and graph.grid(name) is None:
            yield f"activations in {kind}; {target.name} stores {', '.join(target.act_types)}"
    for name in weights:
        for kind in kinds:
            widths = _width(_kind(graph, name)), _width(kind)
            if target.width_pairs and all(widths) and pair(*widths) not in target.width_pairs:
                yield f"{pair(*widths)}; {target.name} has {', '.join(target.width_pairs)}"


def _activation_numbers(graph: OnnxGraph, node: onnx.NodeProto, target: Target) -> Iterator[str]:
    kind = _kind(graph, node.output[0])
    if target.act_types and kind not in target.act_types:
        yield f"activations in {kind}; {target.name} stores {', '.join(target.act_types)}"
    scale = graph.stored_value(node.input[1])
    if scale is None or target.act_scales != "power_of_two":
        return
    if any(math.frexp(step)[0] != 0.5 for step in np.atleast_1d(scale).ravel().tolist()):
        yield f"its scale is no power of two, as {target.name} takes them for activations"


def _weight_numbers(graph: OnnxGraph, name: str, target: Target) -> Iterator[str]:
    kind, grid = _kind(graph, name), graph.grid(name)
    if target.weight_types and kind not in target.weight_types:
        yield f"weights in {kind}; {target.name} stores {', '.join(target.weight_types)}"
    if grid is None or not grid.scale:
        return
    scales = math.prod(size or 1 for size in graph.shapes.get(grid.scale) or ())
    scale_kind = "per_channel" if scales > 1 else "per_tensor"
    if scale_kind not in target.weight_scales:
        yield f"scales of weights {scale_kind}; {target.name} has {', '.join(target.weight_scales)}"


def _kind(graph: OnnxGraph, name: str) -> str:
    """The type of a value as a chip reads it: of the integers behind it, where it has some."""
    grid = graph.grid(name)
    return grid.kind if grid is not None else type_name(graph.element_type(name))


def _width(kind: str) -> int:
    """Bits of an integer type; 0 for others."""
    digits = kind.removeprefix("u").removeprefix("int")
    return int(digits) if digits.isdigit() else 0
