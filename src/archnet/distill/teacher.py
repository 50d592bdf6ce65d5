"""The teacher of a student, captured: it gives its features where the student has taps."""

import inspect

from torch import nn

from archnet.capture import CaptureError, Features, TeacherGraph, capture, unwrap
from archnet.distill.schedule import DistillError
from archnet.loaders import Takes
from archnet.ops import Student


def require_student(student: object, teacher: object) -> None:
    """Raise `DistillError` for what is no student, or no teacher of one."""
    if not isinstance(student, Student):
        if isinstance(teacher, Student):
            raise DistillError(
                "teacher and student are swapped: the student is what convert() made, the teacher "
                "the network that it was made from"
            )
        raise DistillError(
            f"a {type(student).__name__} is not a student: call convert() on it first"
        )
    if isinstance(teacher, Student):
        raise DistillError(
            "the teacher is a student itself: give the network that it was converted from"
        )


def captured(teacher: nn.Module, student: Student) -> TeacherGraph:
    """A student's teacher as one graph; the network stays as it is.

    Raises:
        DistillError: it cannot be captured, or the student was converted from another network.
    """
    require_student(student, teacher)
    takes = Takes.of(student)
    example = takes.example()
    try:
        named = set(inspect.signature(unwrap(teacher).forward).parameters)
    except ValueError:  # TorchScript tells of none
        named = set()
    # By name where the forward has these: converted from a mapping, they may be any of its inputs.
    by_name = takes.shapes.keys() <= named
    try:
        graph = capture(
            teacher, dict(zip(takes.shapes, example, strict=True)) if by_name else example
        )
    except CaptureError as error:
        given = ", ".join(f"{name} (B, {str(shape)[1:]}" for name, shape in takes.shapes.items())
        raise DistillError(
            f"this {type(teacher).__name__} cannot be captured on the student's inputs, {given} "
            f"({error}): give the teacher that convert() was called with"
        ) from error
    shapes = {node.name: node.shape for node in graph.nodes} | graph.inputs
    wanted = {tap.node: student.graph.shapes[tap.value] for tap in student.taps}
    results = zip(graph.outputs, student.graph.outputs, strict=False)
    wanted |= {theirs: student.graph.shapes[ours] for theirs, ours in results}
    for name, shape in wanted.items():
        if shapes.get(name) != shape:
            found = f"gives {shapes[name]}" if name in shapes else "is missing"
            raise DistillError(
                f"the student was converted from another network than this "
                f"{type(teacher).__name__}: {name}, which is compared, {found} in it, and the "
                f"student has {shape}: give the teacher that convert() was called with"
            )
    return graph


def features_of(teacher: nn.Module, student: Student) -> Features:
    """A student's teacher as a module that returns its features at the taps, then its scores.

    Raises:
        ArchnetError: as `captured`; the teacher fixes the size of its batches.
    """
    return captured(teacher, student).features([tap.node for tap in student.taps])
