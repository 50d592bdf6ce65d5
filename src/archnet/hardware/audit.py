"""Is a file pure? Judged on the nodes of the ONNX graph, whoever wrote it."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import onnx
from onnx import helper, inliner

from archnet.errors import ArchnetError
from archnet.hardware.target import Target

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
# Applied to a constant these give a constant: nothing is left to do when the network runs.
FOLDED = ("DequantizeLinear", "QuantizeLinear", *MOVES)
# Shapes are computed for a batch of this size, which no other axis is likely to have.
PROBE = 1009


class AuditError(ArchnetError):
    """A file that cannot be judged, because it is no valid ONNX model."""


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
    """

    target: str
    violations: tuple[Violation, ...]
    counts: dict[str, int]
    moves: dict[str, list[str]]

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
        }


def audit(
    model: str | os.PathLike[str] | onnx.ModelProto, hardware: str | Target | Any = "arch5"
) -> Audit:
    """Judge an ONNX file by what a target runs.

    Args:
        model: the file, or the model in memory.
        hardware: a target, its name, or a config with its fields.

    Raises:
        AuditError: the file is missing or no valid ONNX model.
        ConfigError: there is no such target.
    """
    target = Target.of(hardware)
    graph = _Graph(_read(model))
    counts: dict[str, int] = {}
    moves: dict[str, list[str]] = {}
    violations = []
    for node in graph.nodes:
        label = node.name or f"{node.op_type} -> {', '.join(node.output)}"
        operator, reason = _judge(graph, node, target)
        if reason:
            violations.append(Violation(label, node.op_type, reason))
        elif operator == "move":
            moves.setdefault(node.op_type, []).append(label)
        else:
            counts[operator] = counts.get(operator, 0) + 1
    return Audit(target.name, tuple(violations), counts, moves)


def _read(source: str | os.PathLike[str] | onnx.ModelProto) -> onnx.ModelProto:
    """Load, check and complete a model: functions inlined, shapes inferred."""
    name = "the model" if isinstance(source, onnx.ModelProto) else os.fspath(source)
    try:
        if isinstance(source, onnx.ModelProto):
            model = onnx.ModelProto()
            model.CopyFrom(source)
            onnx.checker.check_model(model)
        else:
            # By path, so that weights beside the file are found and any size can be checked.
            onnx.checker.check_model(name)
            model = onnx.load(name, load_external_data=False)
        if model.functions:
            model = inliner.inline_local_functions(model)
        for item in model.graph.input:
            shape = item.type.tensor_type.shape
            if shape.dim and not shape.dim[0].HasField("dim_value"):
                shape.dim[0].dim_value = PROBE
        del model.graph.value_info[:]
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except OSError as error:
        raise AuditError(f"cannot read {name}: {error.strerror or error}") from error
    except Exception as error:  # The exceptions of onnx and of protobuf have no common base.
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise AuditError(f"{name} is no valid ONNX model: {first_line}") from error


class _Graph:
    """The nodes that compute something when the network runs, and what is known of their inputs.

    Weights are initializers, Constants, and whatever moves or dequantizes only these.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.constants = {item.name for item in graph.initializer}
        self.constants |= {item.values.name for item in graph.sparse_initializer}
        self.constants.add("")  # An optional input that is left out.
        inputs = [item for item in graph.input if item.name not in self.constants]
        self.nodes = []
        self.producer: dict[str, onnx.NodeProto] = {}
        for node in graph.node:
            folds = node.op_type in FOLDED and all(name in self.constants for name in node.input)
            if _is_standard(node) and (node.op_type == "Constant" or folds):
                self.constants.update(node.output)
            else:
                self.nodes.append(node)
                self.producer.update(dict.fromkeys(node.output, node))
        self.shapes: dict[str, tuple[int | None, ...]] = {
            item.name: tuple(item.dims) for item in graph.initializer
        }
        for item in (*graph.input, *graph.value_info, *graph.output):
            if item.type.tensor_type.HasField("shape"):
                self.shapes[item.name] = tuple(
                    dim.dim_value if dim.HasField("dim_value") else None
                    for dim in item.type.tensor_type.shape.dim
                )
        self.batch = {shape[0] for item in inputs if (shape := self.shapes.get(item.name))}

    def constant(self, node: onnx.NodeProto, index: int) -> bool:
        """Whether an input of a node is a constant (or left out)."""
        return index >= len(node.input) or node.input[index] in self.constants

    def shape(self, node: onnx.NodeProto, index: int) -> tuple[int | None, ...] | None:
        return self.shapes.get(node.input[index]) if index < len(node.input) else None


Verdict = tuple[str, str]  # The operator that a node is, and what speaks against it ("" nothing).
_JUDGES: dict[str, Callable[[_Graph, onnx.NodeProto, Target], Verdict]] = {}


def _judges(*operators: str) -> Callable[..., Any]:
    def register(judge: Callable[[_Graph, onnx.NodeProto, Target], Verdict]) -> Any:
        _JUDGES.update(dict.fromkeys(operators, judge))
        return judge

    return register


def _judge(graph: _Graph, node: onnx.NodeProto, target: Target) -> Verdict:
    if not _is_standard(node) or node.op_type not in _JUDGES:
        name = node.op_type if _is_standard(node) else f"{node.domain}.{node.op_type}"
        return "", f"{name} is not an operator of {target.name}"
    operator, reason = _JUDGES[node.op_type](graph, node, target)
    if not reason and operator not in ("move", "activation", "bias", *target.operators):
        reason = f"{operator} is not an operator of {target.name}"
    return operator, reason


@_judges(*MOVES)
def _move(graph: _Graph, node: onnx.NodeProto, target: Target) -> Verdict:
    return "move", ""


@_judges(*ACTIVATIONS)
def _activation(graph: _Graph, node: onnx.NodeProto, target: Target) -> Verdict:
    if not all(graph.constant(node, index) for index in range(1, len(node.input))):
        return "activation", "its bounds or its scale are computed at run time"
    return "activation", ""


@_judges("Conv")
def _convolution(graph: _Graph, node: onnx.NodeProto, target: Target) -> Verdict:
    weight = graph.shape(node, 1)
    if not (graph.constant(node, 1) and graph.constant(node, 2)) or weight is None:
        return "", "its weight or bias is computed at run time"
    attributes, kernel = _attributes(node), _sizes(weight[2:])
    operator = {"3x3": "conv3x3", "1x1": "conv1x1"}.get(kernel, "")
    if not operator:
        return "", f"kernel {kernel}"
    if attributes.get("group", 1) != 1:
        return operator, f"{attributes['group']} groups"
    if set(attributes.get("dilations", [1])) != {1}:
        return operator, f"dilations {attributes['dilations']}"
    if attributes.get("strides", [1, 1]) not in ([1, 1], [2, 2]):
        return operator, f"strides {attributes['strides']}"
    widest = max(size or 0 for size in weight[:2])
    if target.max_channels is not None and widest > target.max_channels:
        return operator, f"{widest} channels; {target.name} holds {target.max_channels}"
    return operator, ""


@_judges("MaxPool")
def _max_pool(graph: _Graph, node: onnx.NodeProto, target: Target) -> Verdict:
    attributes = _attributes(node)
    if attributes["kernel_shape"] != [2, 2]:
        return "maxpool2x2", f"kernel {_sizes(attributes['kernel_shape'])}"
    if set(attributes.get("dilations", [1])) != {1}:
        return "maxpool2x2", f"dilations {attributes['dilations']}"
    if attributes.get("strides", [1, 1]) not in ([1, 1], [2, 2]):
        return "maxpool2x2", f"strides {attributes['strides']}"
    if len(node.output) > 1:
        return "maxpool2x2", "it gives indices as well"
    return "maxpool2x2", ""


@_judges("BatchNormalization")
def _batch_norm(graph: _Graph, node: onnx.NodeProto, target: Target) -> Verdict:
    if not all(graph.constant(node, index) for index in range(1, 5)):
        return "batchnorm", "its statistics are computed at run time"
    if _attributes(node).get("training_mode", 0):
        return "batchnorm", "it is in training mode"
    return "batchnorm", ""


@_judges("Concat")
def _concat(graph: _Graph, node: onnx.NodeProto, target: Target) -> Verdict:
    return "concat", ""


@_judges("Softmax")
def _softmax(graph: _Graph, node: onnx.NodeProto, target: Target) -> Verdict:
    return "softmax", ""


@_judges("Gemm", "MatMul")
def _fully_connected(graph: _Graph, node: onnx.NodeProto, target: Target) -> Verdict:
    constant = [graph.constant(node, index) for index in (0, 1)]
    if not any(constant):
        return "matmul", ""
    if not graph.constant(node, 2) or not _is_vector(graph.shape(node, 2)):
        return "fully_connected", "its bias is no constant vector"
    weight, features = (0, 1) if constant[0] else (1, 0)
    if len(graph.shape(node, weight) or ()) > 2:
        return "fully_connected", "its weight differs from position to position"
    if target.fc_per_position:
        return "fully_connected", ""
    shape = graph.shape(node, features)
    if shape is None or len(shape) != 2 or shape[0] not in graph.batch:
        known = "several rows" if shape else "values of unknown shape"
        return "fully_connected", f"it reads {known}; {target.name} wants one row for each sample"
    return "fully_connected", ""


@_judges("Add")
def _bias(graph: _Graph, node: onnx.NodeProto, target: Target) -> Verdict:
    constant = [graph.constant(node, index) for index in (0, 1)]
    if not any(constant):
        return "", "addition of two activations"
    producer = graph.producer.get(node.input[constant.index(False)])
    behind_weight = (
        producer is not None
        and producer.op_type == "MatMul"
        and (graph.constant(producer, 0) or graph.constant(producer, 1))
    )
    if not behind_weight or not _is_vector(graph.shape(node, constant.index(True))):
        return "", "addition of a constant that is no bias right behind a MatMul with a weight"
    return "bias", ""


def _is_vector(shape: Sequence[int | None] | None) -> bool:
    """Whether at most one axis is longer than one; so is what was left out."""
    return sum(size != 1 for size in shape or ()) <= 1


def _sizes(shape: Sequence[int | None]) -> str:
    return "x".join("?" if size is None else str(size) for size in shape)


def _is_standard(node: onnx.NodeProto) -> bool:
    return node.domain in ("", "ai.onnx")


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}
