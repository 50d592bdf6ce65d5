"""Does a student fit its target? Judged layer by layer, before anything is trained."""

from archnet.errors import ArchnetError
from archnet.hardware.layers import layer_of
from archnet.hardware.target import Target
from archnet.lower.lowering import deployed, deployed_cost
from archnet.ops import Student


class TargetError(ArchnetError):
    """A student that its target cannot run."""


def check_layers(student: Student, target: Target) -> None:
    """Refuse a student with a layer that its target does not run, as lowered for it.

    Widths and scales are not looked at, but for the integer weights of layers that have a
    quantizer, whose sum some targets limit.

    Raises:
        TargetError: names the first such layer, in the student and in the teacher, and the limit.
    """
    student = deployed(student, target)
    for step in student.graph.steps:
        module = student.operator(step.name)
        layer = layer_of(module, [student.graph.shapes[name] for name in step.inputs])
        reason = target.judge(layer)[1] if layer is not None else ""
        if reason:
            raise TargetError(
                f"{_place(step.name, step.origin)}: {reason} (hardware={target.name})"
            )


def check_memory(student: Student, target: Target) -> None:
    """Refuse a student whose activations, at the widths it has, need more memory than there is.

    Raises:
        TargetError: names the layer with the most that is alive at a time, and both sizes.
    """
    if target.memory_bytes is None:
        return
    largest = max(deployed_cost(student, target).steps, key=lambda row: row.live_bytes)
    if largest.live_bytes > target.memory_bytes:
        raise TargetError(
            f"{_place(largest.name, largest.origin)}: it needs {largest.live_bytes:,} bytes for "
            f"activations, and hardware={target.name} has {target.memory_bytes:,} "
            "(hardware.memory_bytes): use smaller inputs or fewer bits"
        )


def _place(name: str, origin: str) -> str:
    return f"step {name}, from '{origin}' in the teacher" if origin else f"step {name}"
