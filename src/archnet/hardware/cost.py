"""What a network costs: multiply-accumulates, bit operations, bytes.

A MAC is one multiplication of a weight (or of an activation, in attention) by an activation.
BOPs are MACs times weight bits times activation bits; what is not quantized has 32 bits.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from archnet.ops import (
    Activation,
    BatchNorm,
    Concat,
    MaxPool2x2,
    Student,
    WeightedOperator,
)
from archnet.ops.layout import LayoutMove, Reshape

FLOAT_BITS = 32
BIAS_BITS = 32


@dataclass(frozen=True)
class StepCost:
    """One step, on one sample.

    ``activation_bits`` are those of what it reads; ``live_bytes`` is all that memory holds while
    it runs: what it reads and writes, and what later steps still need.
    """

    name: str
    operator: str
    origin: str
    macs: int
    bops: int
    parameters: int
    weight_bits: int
    activation_bits: int
    weight_bytes: int
    live_bytes: int


@dataclass(frozen=True)
class Cost:
    """A network on one sample. ``activation_bytes`` is the peak; None where it is not known."""

    macs: int
    bops: int
    parameters: int
    weight_bytes: int
    activation_bytes: int | None = None
    steps: tuple[StepCost, ...] = field(default=(), repr=False)

    def totals(self) -> dict[str, int | None]:
        """The figures without the steps, as plain data."""
        return {key: value for key, value in vars(self).items() if key != "steps"}


def student_cost(student: Student) -> Cost:
    """The cost of a student from its shapes and the quantizers on its operators.

    Batch norms, activations, pooling and moves do no MACs. Weights are packed at their width, a
    bias takes 32 bits, a batch norm a 32-bit scale and shift per channel. For the peak of the
    activations an operator, the activation behind it and a reshape share one buffer (that is how
    integer kernels run them), every other step writes a buffer of its own, packed at its width.
    """
    shapes, bits = student.graph.shapes, _value_bits(student)
    live = _live_bytes(student, bits)
    rows = []
    for step in student.graph.steps:
        module = student.operator(step.name)
        positions = math.prod(shapes[step.name])
        read_bits = max(bits[name] for name in step.inputs)
        macs = parameters = weight_bytes = 0
        weight_bits = FLOAT_BITS
        if isinstance(module, WeightedOperator):
            # Each of the O results is a sum over one row of the weight.
            macs = positions * module.weight[0].numel()
            weight_bits = _bits(module.weight_quantizer)
            parameters = module.weight.numel() + module.bias.numel()
            weight_bytes = _bytes(module.weight.numel(), weight_bits)
            weight_bytes += _bytes(module.bias.numel(), BIAS_BITS)
        elif isinstance(module, BatchNorm):
            parameters = 2 * module.channels
            weight_bytes = _bytes(parameters, FLOAT_BITS)
        rows.append(
            StepCost(
                name=step.name,
                operator=type(module).__name__,
                origin=step.origin,
                macs=macs,
                bops=macs * weight_bits * read_bits,
                parameters=parameters,
                weight_bits=weight_bits,
                activation_bits=read_bits,
                weight_bytes=weight_bytes,
                live_bytes=live[step.name],
            )
        )
    return Cost(
        macs=sum(row.macs for row in rows),
        bops=sum(row.bops for row in rows),
        parameters=sum(row.parameters for row in rows),
        weight_bytes=sum(row.weight_bytes for row in rows),
        activation_bytes=max(row.live_bytes for row in rows),
        steps=tuple(rows),
    )


def teacher_cost(
    teacher: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...],
    weight_bits: int = FLOAT_BITS,
    act_bits: int = FLOAT_BITS,
) -> Cost:
    """The cost of any network on one sample, as it would be at the given widths throughout.

    Counted are convolutions of any kind, linear layers and matrix products, attention's
    included, by running the network once.

    Args:
        teacher: the network; it is left untouched.
        example_inputs: (B, ...) or a tuple of such; the first sample is used.
        weight_bits: of every weight, for BOPs and bytes. Biases and batch norms count as well.
        act_bits: of every activation, for BOPs.
    """
    examples = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    was_training = [(module, module.training) for module in teacher.modules()]
    # Fused attention and fused encoder layers are single operators whose products nobody counts.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    teacher.eval()
    try:
        with (
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            teacher(*(x[:1] for x in examples))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, mode in was_training:
            module.training = mode
    macs = counter.get_total_flops() // 2
    parameters = sum(parameter.numel() for parameter in teacher.parameters())
    return Cost(
        macs=macs,
        bops=macs * weight_bits * act_bits,
        parameters=parameters,
        weight_bytes=_bytes(parameters, weight_bits),
    )


def _bits(quantizer: Any) -> int:
    return FLOAT_BITS if quantizer is None else int(quantizer.bits)


def _bytes(count: int, bits: int) -> int:
    return math.ceil(count * bits / 8)


def _value_bits(student: Student) -> dict[str, int]:
    """Bits of every value: an activation sets them, what computes nothing hands them on."""
    bits = dict.fromkeys(student.graph.inputs, FLOAT_BITS)
    for step in student.graph.steps:
        module = student.operator(step.name)
        if isinstance(module, Activation):
            bits[step.name] = _bits(module.quantizer)
        elif isinstance(module, LayoutMove | MaxPool2x2 | Concat):
            bits[step.name] = max(bits[name] for name in step.inputs)
        else:
            bits[step.name] = FLOAT_BITS
    return bits


def _live_bytes(student: Student, bits: dict[str, int]) -> dict[str, int]:
    """For every step the bytes of all buffers in use while it runs."""
    steps, readers = student.graph.steps, student.consumers()
    # Values that share a buffer, named by the one that stands in it last.
    buffer = {name: name for name in student.graph.shapes}
    for step in reversed(steps):
        module = student.operator(step.name)
        source = step.inputs[0]
        in_place = isinstance(module, Activation | Reshape) and len(readers[source]) == 1
        if in_place and source not in student.graph.inputs:
            buffer[source] = buffer[step.name]
    size = {
        name: _bytes(math.prod(student.graph.shapes[name]), bits[name])
        for name in set(buffer.values())
    }
    last_use = {buffer[student.graph.output]: len(steps)}
    for index, step in enumerate(steps):
        for name in (*step.inputs, step.name):
            last_use[buffer[name]] = max(index, last_use.get(buffer[name], 0))
    live = {buffer[name] for name in student.graph.inputs}
    result = {}
    for index, step in enumerate(steps):
        live.add(buffer[step.name])
        result[step.name] = sum(size[name] for name in live)
        live = {name for name in live if last_use[name] > index}
    return result
