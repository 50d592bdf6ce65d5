"""The walk: every node of the teacher in order, one rule each."""

import difflib
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from archnet.capture import TeacherGraph, TeacherNode, capture
from archnet.convert.builder import Builder, ConversionError, TargetLimits
from archnet.convert.feature import Feature, Form, Value
from archnet.convert.rules import RULES
from archnet.convert.rules.base import Site
from archnet.convert.taps import choose_taps
from archnet.hardware import Target
from archnet.ops import NodeReport, Student, Tap, WeightedOperator


def convert(
    teacher: nn.Module | TeacherGraph,
    example_inputs: Tensor | tuple[Tensor, ...] | None = None,
    hardware: str | TargetLimits = "arch5",
    *,
    start: str = "exact",
    taps: Sequence[str] | None = None,
    seed: int = 0,
) -> Student:
    """Convert a trained network into a student of the target's operators.

    Args:
        teacher: the network (it is left untouched), or its captured graph.
        example_inputs: (B, C, H, W) or a tuple of inputs; fixes every size but the batch.
        hardware: the target's name or description.
        start: "exact" keeps the teacher's function; "random" draws new weights (Kaiming normal)
            and is there for ablations.
        taps: module paths whose outputs are compared in distillation; chosen from the graph
            (block outputs) when absent.
        seed: of the random start.

    Returns:
        The student in eval mode, on the CPU, float32; ``student.report`` tells what became of
        each node of the teacher.

    Raises:
        CaptureError: the teacher cannot be captured.
        ConversionError: an operator has no rule, or a tap's path does not exist.
    """
    target = Target.named(hardware) if isinstance(hardware, str) else hardware
    if isinstance(teacher, TeacherGraph):
        graph = teacher
    else:
        if example_inputs is None:
            raise ConversionError("convert needs example_inputs to capture the teacher")
        graph = capture(teacher, example_inputs)
    _require_rules(graph)
    tap_nodes = choose_taps(graph, taps)
    builder = Builder(target)
    builder.paths = {node.name: node.path for node in graph.nodes}
    values: dict[str, Value] = {
        name: builder.input(name, shape) for name, shape in graph.inputs.items()
    }
    uses, tapped = graph.uses(), {node.name for _, node in tap_nodes}
    last_reader = {name: node.name for node in graph.nodes for name in node.refs()}
    last_reader[graph.output] = ""
    for node in graph.nodes:
        builder.owner = node.name
        value = RULES[node.operator].apply(Site(node, values, builder))
        if isinstance(value, Form):
            value.owner = value.owner or node.name
            # Read once, a form folds into its reader; read twice, it would be computed twice.
            if uses.get(node.name, 0) > 1 or node.name in tapped:
                value = builder.build(value)
        if isinstance(value, Feature) and node.name in tapped:
            # All that follows reads the tap itself, so that a block can start from it.
            value = Feature(value.shape, first=builder.first(value))
        if value.shape != node.shape:
            raise ConversionError(
                f"{node.operator} at '{node.path}' gives {node.shape} in the teacher, "
                f"{value.shape} in the student: its rule has a fault"
            )
        values[node.name] = value
        # Forms hold weights in float64: one that nobody reads again is let go.
        for name in set(node.refs()):
            if last_reader[name] == node.name and name not in tapped:
                values.pop(name, None)  # the size of a batch is none of them
    builder.owner = graph.output
    builder.graph.output = builder.first(builder.build(values[graph.output]))
    builder.graph.taps = [
        Tap(path or node.name, node.name, _name_of(values[node.name])) for path, node in tap_nodes
    ]
    builder.graph.report = [
        NodeReport(
            node.path,
            node.operator,
            RULES[node.operator].name,
            RULES[node.operator].exact,
            teacher_macs(node),
            builder.macs.get(node.name, 0),
        )
        for node in graph.nodes
    ]
    student = Student(builder.graph, builder.modules).eval()
    if start == "random":
        randomise(student, seed)
    elif start != "exact":
        raise ConversionError(f"convert.start={start}: choose exact or random")
    return student


def _name_of(value: Value) -> str:
    assert isinstance(value, Feature)
    assert value.first is not None
    return value.first


def missing_rules(graph: TeacherGraph) -> dict[str, list[str]]:
    """The operators that no rule converts, with the module path of every node, in forward order."""
    missing: dict[str, list[str]] = {}
    for node in graph.nodes:
        if node.operator not in RULES:
            missing.setdefault(node.operator, []).append(node.path)
    return missing


def _require_rules(graph: TeacherGraph) -> None:
    missing = missing_rules(graph)
    if not missing:
        return
    operator, *others = missing
    short = operator.removeprefix("aten.").split(".")[0].strip("_")
    near = difflib.get_close_matches(operator, RULES, 1, 0.6)
    like = f" (compare the rule of {near[0]})" if near else ""
    # The first is enough to start with, and all of them tell how far the teacher is.
    more = f"; no rule either for {', '.join(others)}" if others else ""
    raise ConversionError(
        f"no rule for {operator} at '{missing[operator][0]}': add one with "
        f'@rule("{operator}") in src/archnet/convert/rules/{short}.py, '
        f"and list the file in rules/__init__.py{like}{more}"
    )


def teacher_macs(node: TeacherNode) -> int:
    """Multiply-accumulates of a teacher's node for one sample (convolutions and linear layers)."""
    weight = node.arguments.get("weight")
    if node.operator.startswith(("aten.conv2d", "aten.linear")) and isinstance(weight, Tensor):
        return math.prod(node.shape) * math.prod(weight.shape[1:])
    return 0


def randomise(student: Student, seed: int) -> None:
    """Draw new weights for everything that is trained; constants of the conversion stay."""
    generator = torch.Generator().manual_seed(seed)
    for module in student.modules():
        if isinstance(module, WeightedOperator) and module.trainable:
            fan_in = module.weight[0].numel()
            with torch.no_grad():
                module.weight.normal_(0.0, math.sqrt(2.0 / fan_in), generator=generator)
                module.bias.zero_()
