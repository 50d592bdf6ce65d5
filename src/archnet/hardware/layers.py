"""What a target is asked about a student's operator."""

from collections.abc import Sequence
from typing import Any

from archnet.hardware.target import Layer
from archnet.ops import (
    Add,
    AddConstant,
    AveragePool,
    BatchNorm,
    Concat,
    Convolution,
    FullyConnected,
    Function,
    LayerNorm,
    MatMul,
    MaxPool,
    Mean,
    Multiply,
    Operator,
    Segments,
    Softmax,
    WeightedOperator,
)

_KINDS: dict[type[Operator], str] = {
    FullyConnected: "fully_connected",
    Add: "add",
    AddConstant: "add",
    BatchNorm: "batchnorm",
    Segments: "batchnorm",
    Concat: "concat",
    LayerNorm: "layernorm",
    Multiply: "mul",
    MatMul: "matmul",
    Softmax: "softmax",
}


def layer_of(
    module: Operator, read: Sequence[tuple[int, ...]], *, weights: bool = True
) -> Layer | None:
    """What a target is asked about a student's operator; None for activations and moves.

    Args:
        module: the operator.
        read: shapes of what it reads, for one sample.
        weights: whether it has its weights, whose sum some targets limit.
    """
    sums = _weight_sum(module) if weights and isinstance(module, WeightedOperator) else None
    if isinstance(module, Convolution):
        return Layer(
            "conv",
            kernel=module.kernel,
            stride=module.stride,
            dilation=module.dilation,
            groups=module.groups,
            channels=max(module.in_channels, module.out_channels),
            padded=any(module.padding),
            weight_sum=sums,
        )
    if isinstance(module, MaxPool | AveragePool):
        return Layer(
            "maxpool" if isinstance(module, MaxPool) else "averagepool",
            kernel=module.kernel,
            stride=module.stride,
            dilation=module.dilation if isinstance(module, MaxPool) else (1, 1),
            channels=read[0][0],
            padded=any(module.padding),
        )
    if isinstance(module, Mean):
        return Layer("reduce_sum" if module.factor == 1 else "mean")
    if isinstance(module, Function):
        return Layer("erf" if module.parts else module.kind)
    for operator, kind in _KINDS.items():
        if isinstance(module, operator):
            if isinstance(module, WeightedOperator):
                return Layer(kind, channels=max(module.weight.shape), weight_sum=sums)
            return Layer(kind)
    return None


def _weight_sum(module: WeightedOperator) -> int | None:
    quantizer: Any = module.weight_quantizer
    if quantizer is None:
        return None
    rows = quantizer.integers(module.weight.detach()).flatten(1)
    return int(rows.abs().sum(1).max())
