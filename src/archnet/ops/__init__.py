"""The five operators, their activation, layout moves, and the student made of them."""

from archnet.ops.layout import LayoutMove, Pad, Permute, Reshape, Slice
from archnet.ops.operators import (
    Activation,
    BatchNorm,
    Concat,
    Conv3x3,
    FullyConnected,
    MaxPool2x2,
    Operator,
    WeightedOperator,
)
from archnet.ops.student import NodeReport, Step, Student, StudentGraph, Tap

__all__ = [
    "Activation",
    "BatchNorm",
    "Concat",
    "Conv3x3",
    "FullyConnected",
    "LayoutMove",
    "MaxPool2x2",
    "NodeReport",
    "Operator",
    "Pad",
    "Permute",
    "Reshape",
    "Slice",
    "Step",
    "Student",
    "StudentGraph",
    "Tap",
    "WeightedOperator",
]
