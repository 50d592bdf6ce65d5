"""The five operators, their activation, layout moves, and the student made of them."""

from archnet.ops.graph import NodeReport, Refinement, Step, StudentGraph, Tap
from archnet.ops.layout import LayoutMove, Pad, Permute, Reshape, Slice
from archnet.ops.operators import (
    Activation,
    BatchNorm,
    Concat,
    Conv3x3,
    FullyConnected,
    MaxPool2x2,
    MaxPooling,
    Operator,
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
    "Activation",
    "BatchNorm",
    "Concat",
    "Conv3x3",
    "FullyConnected",
    "History",
    "LayoutMove",
    "MatMul",
    "MaxPool2x2",
    "MaxPooling",
    "MergeHeads",
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
    "Tap",
    "TokenEmbedding",
    "WeightedOperator",
    "Window",
]
