"""Whole operators, their activation, layout moves, and the student made of them."""

from archnet.ops.graph import NodeReport, Refinement, Step, StudentGraph, Tap
from archnet.ops.layout import LayoutMove, Pad, Permute, Reshape, Slice
from archnet.ops.native import NATIVE, Function, LayerNorm, Multiply
from archnet.ops.operators import (
    Activation,
    Add,
    AveragePool,
    BatchNorm,
    Concat,
    Convolution,
    FullyConnected,
    MaxPool,
    MaxPooling,
    Mean,
    Operator,
    Summing,
    WeightedOperator,
)
from archnet.ops.sequence import (
    History,
    MatMul,
    MergeHeads,
    PairFullyConnected,
    Softmax,
    SourcePool,
    SplitHeads,
    TokenEmbedding,
    Window,
)
from archnet.ops.stepwise import Stepwise
from archnet.ops.student import Student

__all__ = [
    "NATIVE",
    "Activation",
    "Add",
    "AveragePool",
    "BatchNorm",
    "Concat",
    "Convolution",
    "FullyConnected",
    "Function",
    "History",
    "LayerNorm",
    "LayoutMove",
    "MatMul",
    "MaxPool",
    "MaxPooling",
    "Mean",
    "MergeHeads",
    "Multiply",
    "NodeReport",
    "Operator",
    "Pad",
    "PairFullyConnected",
    "Permute",
    "Refinement",
    "Reshape",
    "Slice",
    "Softmax",
    "SourcePool",
    "SplitHeads",
    "Step",
    "Stepwise",
    "Student",
    "StudentGraph",
    "Summing",
    "Tap",
    "TokenEmbedding",
    "WeightedOperator",
    "Window",
]
