"""Does a student fit its target? Judged layer by layer, before anything is trained."""

from typing import Any

from archnet.errors import ArchnetError
from archnet.hardware.cost import student_cost
from archnet.hardware.target import Layer, Target
from archnet.ops import (
    BatchNorm,
    Concat,
    Conv3x3,
    FullyConnected,
    MatMul,
    MaxPool2x2,
    Operator,
    Softmax,
    Student,
    WeightedOperator,
)

_KINDS: dict[type[Operator], str] = {
    FullyConnected: "fully_connected",
    BatchNorm: "batchnorm",
    Concat: "concat",
    MatMul: "matmul",
    Softmax: "softmax",
}


class TargetError(ArchnetError):
    """A student that its target cannot run."""


def check_layers(student: Student, target: Target) -> None:
    """Refuse a student with a layer beyond the target's limits.

    Widths and scales are not looked at, but for the integer weights of layers that have a
    quantizer, whose sum some targets limit.

    Raises:
        TargetError: names the first such layer, in the student and in the teacher, and the limit.
    """
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
    largest = max(student_cost(student).steps, key=lambda row: row.live_bytes)
    if largest.live_bytes > target.memory_bytes:
        raise TargetError(
            f"{_place(largest.name, largest.origin)}: {largest.live_bytes:,} bytes of activations "
            f"are alive there, and hardware={target.name} holds {target.memory_bytes:,} "
            "(hardware.memory_bytes); take smaller inputs or fewer bits"
        )


def layer_of(module: Operator, read: list[tuple[int, ...]]) -> Layer | None:
    """What a target is asked about a student's operator; None for activations and moves.

    Args:
        module: the operator.
        read: shapes of what it reads, for one sample.
    """
    if isinstance(module, Conv3x3):
        return Layer(
            "conv",
            kernel=(3, 3),
            stride=(module.stride,) * 2,
            dilation=(1, 1),
            channels=max(module.in_channels, module.out_channels),
            padded=module.padding > 0,
            weight_sum=_weight_sum(module),
        )
    if isinstance(module, MaxPool2x2):
        return Layer(
            "maxpool",
            kernel=(2, 2),
            stride=(module.stride,) * 2,
            dilation=(1, 1),
            channels=read[0][0],
            padded=any(module.padding),
        )
    for operator, kind in _KINDS.items():
        if isinstance(module, operator):
            if isinstance(module, WeightedOperator):
                return Layer(
                    kind, channels=max(module.weight.shape), weight_sum=_weight_sum(module)
                )
            return Layer(kind)
    return None


def _weight_sum(module: WeightedOperator) -> int | None:
    quantizer: Any = module.weight_quantizer
    if quantizer is None:
        return None
    rows = quantizer.integers(module.weight.detach()).flatten(1)
    return int(rows.abs().sum(1).max())


def _place(name: str, origin: str) -> str:
    return f"step {name}, from '{origin}' in the teacher" if origin else f"step {name}"
