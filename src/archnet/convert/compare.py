"""A student beside its teacher, once, when it is made: what is called exact is, and of what is not
the error is kept.
"""

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from archnet.capture import TeacherGraph, place
from archnet.capture.compare import difference, is_rounding, run, samples
from archnet.convert.budget import Built
from archnet.convert.builder import ConversionError
from archnet.ops import NodeReport, Student

FITTED = 8  # samples on which the error of a student with approximations is measured

_log = logging.getLogger(__name__)


def compare(
    built: Built,
    graph: TeacherGraph,
    calibration: tuple[Tensor, ...] | None,
    search: Callable[[tuple[Tensor, ...]], None],
) -> None:
    """Compare a new student with its teacher; the error at its output, the largest of several,
    is kept in its graph.

    What depends on no approximation is compared at taps and at the output, on the example and on
    a sample that is drawn; the output of a student with approximations on a few samples that it
    was fitted to. One forward pass of each.

    Args:
        built: the student, and which nodes of the teacher it has exactly.
        graph: the teacher.
        calibration: what approximations were fitted to, if there are any.
        search: raises `ConversionError` at the first node that differs on these inputs.

    Raises:
        ConversionError: something that is called exact differs by more than 1e-4 and by more than
            rounding explains.
    """
    student = built.student
    args, named = graph.program.example_inputs
    examples = (*args, *named.values())
    inputs = samples(examples)
    batches = graph.batches()
    places = [(tap.path, tap.node, tap.value) for tap in student.taps if tap.node in built.exact]
    outputs = list(zip(graph.outputs, student.graph.outputs, strict=True))
    places += [("", node, value) for node, value in outputs if node in built.exact]
    peeled = {node.name for node in graph.head}
    errors: list[float] = []
    theirs = run(graph.program, inputs, [node for _, node, _ in places], peeled)
    ours = _values(student, inputs, [value for _, _, value in places])
    shapes = {node.name: node.shape for node in graph.nodes} | graph.inputs
    for path, node, value in places:
        wanted = batches[node].samples(theirs[node], shapes[node])
        error = difference(ours[value], wanted)
        if not is_rounding(error, graph.program, inputs, node, peeled):
            search(inputs)
            where = f"at '{path}'" if path else f"at its output {_name(student, value)}".rstrip()
            raise ConversionError(
                f"the student differs from the teacher {where}: relative error {error:.1e}, "
                "although every rule up to there is exact. This is a bug in archnet; please report "
                "it with the network"
            )
        errors += [] if path else [error]
    fitted = [(node, value) for node, value in outputs if node not in built.exact]
    if not fitted:
        student.graph.error = max(errors)
        return
    if calibration is not None and not graph.fixed_batch:
        inputs = tuple(x[:FITTED].to(y) for x, y in zip(calibration, examples, strict=True))
    scores = dict(built.scores)
    if unknown := [node for node, _ in fitted if node not in scores]:
        scores |= run(graph.program, inputs, unknown, peeled)
    ours = _values(student, inputs, [value for _, value in fitted])
    errors += [difference(ours[value], scores[node]) for node, value in fitted]
    student.graph.error = max(errors, key=lambda error: math.inf if math.isnan(error) else error)
    if not student.graph.error <= 1:
        _log.warning("%s", _explosion(student.graph.error, student.report))


def _name(student: Student, value: str) -> str:
    """Which of several outputs a value is, in quotes; "" where there is one."""
    names, outputs = student.graph.output_names, student.graph.outputs
    return f"'{names[outputs.index(value)]}'" if len(names) > 1 else ""


def _values(student: Student, inputs: tuple[Tensor, ...], names: list[str]) -> dict[str, Tensor]:
    """Values of a student by name, one sample after another, so that memory holds those of one."""
    given = {n: x.float().cpu() for n, x in zip(student.graph.inputs, inputs, strict=True)}
    wanted = [name for name in names if name not in given]
    parts: dict[str, list[Tensor]] = {name: [] for name in wanted}
    with torch.no_grad():
        for one in zip(*(x.split(1) for x in given.values()), strict=True):
            for name, value in student.visit(dict(zip(given, one, strict=True)), wanted):
                parts[name].append(value)
    return given | {name: torch.cat(found) for name, found in parts.items()}


def _explosion(error: float, report: list[NodeReport]) -> str:
    rows = [row for row in report if row.error is not None]
    said = (
        f"the student differs much from the teacher before training: relative error {error:.1e} "
        "at the output"
    )
    if not rows:
        return said
    worst = max(rows, key=lambda row: math.inf if math.isnan(row.error or 0) else row.error or 0)
    return (
        f"{said}; the largest error of one operator is {worst.error:.1e}: {worst.operator} "
        f"{place(worst.path)} ({worst.rule}). More calibration inputs (convert.calibration) or "
        "other approximations (convert.attention, convert.hinges, convert.norm_hinges, "
        "convert.gate_hinges) may reduce it"
    )
