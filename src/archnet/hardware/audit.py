"""Is a file pure? Judged on the nodes of the ONNX graph, whoever wrote it."""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx

from archnet.config import pair
from archnet.errors import printable
from archnet.hardware.onnx_file import AuditError
from archnet.hardware.onnx_graph import (
    ACTIVATIONS,
    MOVES,
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
from archnet.hardware.target import OPERATORS_OF, Layer, Target, sizes

__all__ = ["Audit", "AuditError", "NotJudged", "Violation", "audit", "grouped"]

# What ONNX's operators are called in `archnet.config.OPERATORS`, where that takes no look at them.
NAMES = {
    "And": "and",
    "ArgMax": "argmax",
    "ArgMin": "argmin",
    "Concat": "concat",
    "ConstantOfShape": "constant_of_shape",
    "Cos": "cos",
    "Softmax": "softmax",
    "LayerNormalization": "layernorm",
    "InstanceNormalization": "instancenorm",
    "LRN": "lrn",
    "LSTM": "lstm",
    "GRU": "gru",
    "Sub": "sub",
    "Mul": "mul",
    "Div": "div",
    "Mod": "mod",
    "Max": "maximum",
    "Min": "minimum",
    "Abs": "abs",
    "Neg": "neg",
    "Exp": "exp",
    "Log": "log",
    "Floor": "floor",
    "Sin": "sin",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "HardSigmoid": "hardsigmoid",
    "HardSwish": "hardswish",
    "Swish": "swish",
    "Mish": "mish",
    "Gelu": "gelu",
    "LeakyRelu": "leaky_relu",
    "PRelu": "prelu",
    "Elu": "elu",
    "Erf": "erf",
    "Sqrt": "sqrt",
    "Pow": "pow",
    "Cast": "cast",
    "Equal": "equal",
    "Greater": "greater",
    "GreaterOrEqual": "greater_or_equal",
    "Less": "less",
    "LessOrEqual": "less_or_equal",
    "LogSoftmax": "log_softmax",
    "LpNormalization": "lp_normalization",
    "MeanVarianceNormalization": "mean_variance_normalization",
    "Not": "not",
    "Or": "or",
    "Where": "where",
    "Expand": "expand",
    "Tile": "tile",
    "GatherElements": "gather_elements",
    "ScatterND": "scatter_nd",
    "ReverseSequence": "reverse_sequence",
    "ReduceMax": "reduce_max",
    "ReduceMin": "reduce_min",
    "ReduceSum": "reduce_sum",
    "Softplus": "softplus",
    "TopK": "top_k",
    "MaxRoiPool": "max_roi_pool",
    "MaxUnpool": "max_unpool",
    "DepthToSpace": "depth_to_space",
    "SpaceToDepth": "space_to_depth",
}


@dataclass(frozen=True)
class Finding:
    """A node of the file, and what was found about it."""

    node: str
    operator: str
    reason: str

    def __str__(self) -> str:
        return printable(f"{self.node} ({self.operator}): {self.reason}", 400)


class Violation(Finding):
    """A node outside the target."""


class NotJudged(Finding):
    """A node that the target's description does not mention."""


@dataclass(frozen=True)
class Audit:
    """What a file is made of.

    ``counts`` has the number of nodes of every operator of the target, and of activations;
    ``moves`` lists the layout moves by type, which are allowed; ``violations`` is what the target
    does not run, ``not_judged`` what its description does not mention. ``notes`` tell what else
    could not be judged.
    """

    target: str
    violations: tuple[Violation, ...]
    counts: dict[str, int]
    moves: dict[str, list[str]]
    notes: tuple[str, ...] = ()
    not_judged: tuple[NotJudged, ...] = ()

    @property
    def pure(self) -> bool:
        """Whether there is no violation: as far as judged, see ``not_judged``."""
        return not self.violations

    def summary(self) -> dict[str, Any]:
        """As plain data, with the number of moves of each type for their names."""
        return {
            "target": self.target,
            "pure": self.pure,
            "violations": [asdict(violation) for violation in self.violations],
            "not_judged": dict(Counter(finding.operator for finding in self.not_judged)),
            "counts": dict(self.counts),
            "moves": {operator: len(names) for operator, names in self.moves.items()},
            "notes": list(self.notes),
        }

    def groups(self) -> dict[tuple[str, str], list[str]]:
        """The names of the nodes outside the target, by their operator and what is wrong."""
        return grouped(self.violations)


def grouped(findings: Sequence[Finding]) -> dict[tuple[str, str], list[str]]:
    """The names of nodes, grouped by operator and finding."""
    found: dict[tuple[str, str], list[str]] = {}
    for finding in findings:
        found.setdefault((finding.operator, finding.reason), []).append(finding.node)
    return found


def audit(
    model: str | os.PathLike[str] | onnx.ModelProto,
    hardware: str | Target | Any = "arch5",
    inputs: Sizes | None = None,
) -> Audit:
    """Compare an ONNX file with what a target runs.

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
    violations, not_judged = [], []
    for node in graph.nodes:
        label = node.name or f"{node.op_type} -> {', '.join(node.output)}"
        verdict = _judge(graph, node, target)
        reason = verdict.reason if verdict.judged else ""
        reason = reason or next(_numbers(graph, node, target), "")
        if reason:
            violations.append(Violation(label, node.op_type, reason))
        elif not verdict.judged:
            not_judged.append(NotJudged(label, operator_name(node), verdict.reason))
        elif verdict.operator == "move":
            moves.setdefault(node.op_type, []).append(label)
        else:
            counts[verdict.operator] = counts.get(verdict.operator, 0) + 1
    notes = tuple(_notes(graph, target))
    return Audit(target.name, tuple(violations), counts, moves, notes, tuple(not_judged))


class Verdict(NamedTuple):
    """The operator that a node is, what speaks against it ("" nothing), and whether that counts."""

    operator: str
    reason: str = ""
    judged: bool = True


Judge = Callable[[OnnxGraph, onnx.NodeProto, Target], Verdict]
_JUDGES: dict[str, Judge] = {}


def _judges(*operators: str) -> Callable[[Judge], Judge]:
    def register(judge: Judge) -> Judge:
        _JUDGES.update(dict.fromkeys(operators, judge))
        return judge

    return register


def _judge(graph: OnnxGraph, node: onnx.NodeProto, target: Target) -> Verdict:
    if is_quantization(node):
        return _activation(graph, node, target)
    if is_standard(node) and node.op_type in _JUDGES:
        return _JUDGES[node.op_type](graph, node, target)
    name = operator_name(node)
    return _asked(target, Layer(NAMES.get(name, name)))


def _asked(target: Target, layer: Layer) -> Verdict:
    """What a target's description says of a layer."""
    return Verdict(*target.judge(layer), target.states(layer))


def _doubtful(target: Target, operator: str, reason: str) -> Verdict:
    """What no description of a chip speaks of: outside of a target that is told in full."""
    return Verdict(operator, reason, target.complete)


def _notes(graph: OnnxGraph, target: Target) -> Iterator[str]:
    quantized = any(
        node.op_type in ("QuantizeLinear", "DequantizeLinear")
        for node in (*graph.nodes, *graph.folded.values())
    )
    if not quantized and (target.weight_types or target.act_types):
        yield f"the file is float: the types and scales of {target.name} are not judged"
    if any(node.op_type.startswith("QLinear") for node in graph.nodes):
        yield "QLinear operators are not judged: quantize in QDQ format"
    if any(node.op_type == "Shape" for node in graph.nodes):
        yield "arithmetic on sizes becomes constant if inputs have fixed sizes: export with these"


@_judges(*MOVES)
def _move(graph: OnnxGraph, node: onnx.NodeProto, target: Target) -> Verdict:
    if not all(graph.constant(node, index) for index in range(1, len(node.input))):
        return _doubtful(target, "move", "its shape or its bounds are computed at run time")
    return Verdict("move")


@_judges("Gather")
def _gather(graph: OnnxGraph, node: onnx.NodeProto, target: Target) -> Verdict:
    """With constant indices it moves values; else it looks them up."""
    return Verdict("move") if graph.constant(node, 1) else _asked(target, Layer("gather"))


@_judges("Dropout")
def _dropout(graph: OnnxGraph, node: onnx.NodeProto, target: Target) -> Verdict:
    """Outside of training it is the identity."""
    mode = node.input[2] if len(node.input) > 2 else ""
    value = graph.stored_value(mode) if mode else np.False_
    if value is None or value.size != 1 or bool(value):
        return _doubtful(target, "move", "it may be in training mode")
    return Verdict("move")


@_judges("Shape", "Size")
def _shape(graph: OnnxGraph, node: onnx.NodeProto, target: Target) -> Verdict:
    operator, reason, judged = _asked(target, Layer(node.op_type.lower()))
    if reason and judged:
        reason = "it reads a size that the file leaves open, or that depends on the data"
    return Verdict(operator, reason, judged)


@_judges(*ACTIVATIONS)
def _activation(graph: OnnxGraph, node: onnx.NodeProto, target: Target) -> Verdict:
    if not all(graph.constant(node, index) for index in range(1, len(node.input))):
        return _doubtful(target, "activation", "its bounds or its scale are computed at run time")
    return Verdict("activation")


@_judges("Conv", "ConvTranspose")
def _convolution(graph: OnnxGraph, node: onnx.NodeProto, target: Target) -> Verdict:
    kind = "conv" if node.op_type == "Conv" else "conv_transpose"
    weight = graph.shape(node, 1)
    if not (graph.constant(node, 1) and graph.constant(node, 2)) or weight is None:
        return _doubtful(target, kind, "its weight or bias is computed at run time")
    if len(weight) < 3:
        return Verdict(kind, f"its weight is {sizes(weight) or 'one number'}, no kernel")
    groups = int(attributes(node).get("group", 1))
    # (O, I / groups, ...), transposed (I, O / groups, ...).
    outer, inner = (size or 0 for size in weight[:2])
    kernel = tuple(size or 0 for size in weight[2:])
    return _asked(
        target,
        Layer(
            _on_axes(kind, len(kernel)),
            **_window(node, kernel),
            groups=groups,
            channels=max(outer, inner * groups),
            weight_sum=_weight_sum(graph, node.input[1], 0) if kind == "conv" else None,
        ),
    )


def _on_axes(kind: str, axes: int) -> str:
    """A kind of layer with a window, by the number of axes that the window has: conv3d."""
    return kind if axes == 2 else f"{kind}{axes}d"


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
    return int(np.abs(rows.astype(np.int64)).sum(1).max(initial=0))


_POOLS = {
    "MaxPool": "maxpool",
    "GlobalMaxPool": "maxpool",
    "AveragePool": "averagepool",
    "GlobalAveragePool": "averagepool",
}


@_judges(*_POOLS)
def _pool(graph: OnnxGraph, node: onnx.NodeProto, target: Target) -> Verdict:
    kind = _POOLS[node.op_type]
    if not node.op_type.startswith("Global"):
        kernel = tuple(attributes(node)["kernel_shape"])
        if len(node.output) > 1:
            return _doubtful(target, kind, "it gives indices as well")
        return _asked(target, Layer(_on_axes(kind, len(kernel)), **_window(node, kernel)))
    shape = graph.shape(node, 0)
    if shape is None or len(shape) < 3:
        return Verdict(kind, "the size of its window is not known", False)
    ones = (1,) * len(shape[2:])
    layer = Layer(_on_axes(kind, len(ones)), tuple(size or 1 for size in shape[2:]), ones, ones)
    bounded = target.complete or target.limits.get(kind)
    if None in shape[2:] and bounded and kind in (*OPERATORS_OF, *target.operators):
        return _doubtful(target, kind, "the size of its window is not known")
    return _asked(target, layer)


@_judges("Resize", "Upsample")
def _resize(graph: OnnxGraph, node: onnx.NodeProto, target: Target) -> Verdict:
    mode = attributes(node).get("mode", b"nearest").decode(errors="replace")
    verdict, shape = _asked(target, Layer(f"resize_{mode}")), graph.shape(node, 0)
    if verdict.reason:
        return verdict
    if shape is None or len(shape) != 4:
        reason = "it may resize other axes than height and width"
        return _doubtful(target, verdict.operator, reason)
    if not all(graph.constant(node, index) for index in range(1, len(node.input))):
        return _doubtful(target, verdict.operator, "its size is computed at run time")
    return verdict


@_judges("RoiAlign")
def _region(graph: OnnxGraph, node: onnx.NodeProto, target: Target) -> Verdict:
    mode = attributes(node).get("mode", b"avg").decode(errors="replace")
    return _asked(target, Layer(f"roi_align_{mode}"))


@_judges("ReduceMean")
def _mean(graph: OnnxGraph, node: onnx.NodeProto, target: Target) -> Verdict:
    if not graph.constant(node, 1):
        return _doubtful(target, "mean", "its axes are computed at run time")
    return _asked(target, Layer("mean"))


@_judges("BatchNormalization")
def _batch_norm(graph: OnnxGraph, node: onnx.NodeProto, target: Target) -> Verdict:
    if not all(graph.constant(node, index) for index in range(1, 5)):
        return _doubtful(target, "batchnorm", "its statistics are computed at run time")
    if attributes(node).get("training_mode", 0):
        return _doubtful(target, "batchnorm", "it is in training mode")
    return _asked(target, Layer("batchnorm"))


@_judges("Gemm", "MatMul")
def _fully_connected(graph: OnnxGraph, node: onnx.NodeProto, target: Target) -> Verdict:
    constant = [graph.constant(node, index) for index in (0, 1)]
    if not any(constant):
        return _asked(target, Layer("matmul"))
    if not graph.constant(node, 2) or not _is_vector(graph.shape(node, 2)):
        return _doubtful(target, "fully_connected", "its bias is no constant vector")
    weight, features = (0, 1) if constant[0] else (1, 0)
    shape = graph.shape(node, weight) or ()
    if len(shape) > 2:
        reason = "its weight differs from position to position"
        return _doubtful(target, "fully_connected", reason)
    outputs = int(attributes(node).get("transB", 0) == 0) if weight == 1 else 0
    layer = Layer(
        "fully_connected",
        channels=max((size or 1 for size in shape), default=1),
        weight_sum=_weight_sum(graph, node.input[weight], outputs),
    )
    verdict = _asked(target, layer)
    if verdict.reason or target.fc_per_position:
        return verdict
    read_shape = graph.shape(node, features)
    if read_shape is None or len(read_shape) != 2 or read_shape[0] != graph.batch:
        known = "several rows" if read_shape else "values of unknown shape"
        reason = f"it reads {known}; {target.name} takes one row for each sample"
        return Verdict(verdict.operator, reason)
    return verdict


@_judges("Add")
def _add(graph: OnnxGraph, node: onnx.NodeProto, target: Target) -> Verdict:
    constant = [graph.constant(node, index) for index in (0, 1)]
    if any(constant) and _is_bias(graph, node, constant.index(True)):
        return Verdict("bias")
    verdict = _asked(target, Layer("add"))
    if not verdict.reason or not verdict.judged:
        return verdict
    if any(constant):
        reason = "addition of a constant that is not the bias of a MatMul with a weight"
        return Verdict("add", reason)
    return Verdict("add", "addition of two activations")


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
        yield f"its scale is not a power of two, which {target.name} needs for activations"


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
