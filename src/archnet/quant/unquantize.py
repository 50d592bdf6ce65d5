"""Back from a quantized student to a float one: where training at few bits begins with more."""

import json
from dataclasses import replace

from archnet.ops import (
    Activation,
    Concat,
    LayoutMove,
    MaxPooling,
    Operator,
    Step,
    Student,
    WeightedOperator,
)


def unquantize(student: Student) -> Student:
    """Take quantizers out of a student, in place, and the steps that are there for them alone.

    Weights are those that training moved, before any rounding, so that a student which is not
    settled yet keeps what its training knew about halves of a step. Quantized again at fewer bits
    it is where progressive quantization begins (Zhuang et al. 2018, arXiv 1711.00205).

    Args:
        student: quantized or not; of one that is not, nothing changes but steps that are there
            twice.

    Returns:
        The same student.
    """
    renamed: dict[str, str] = {}
    seen: dict[tuple[str, str, tuple[str, ...]], str] = {}
    steps: list[Step] = []
    for step in student.graph.steps:
        inputs = tuple(renamed.get(name, name) for name in step.inputs)
        module = student.operator(step.name)
        if isinstance(module, WeightedOperator):
            module.weight_quantizer = module.bias_quantizer = None
        if isinstance(module, Activation):
            module.quantizer = None
        if isinstance(module, Activation) and not module.spec():
            # A place for a quantizer and nothing else.
            renamed[step.name] = inputs[0]
        elif _is_free(module) and (twin := seen.setdefault(_key(module, inputs), step.name)) != (
            step.name
        ):
            # A layout move that was made twice, on finer values and on narrower ones.
            renamed[step.name] = twin
        else:
            steps.append(Step(step.name, inputs, step.origin))
    graph = student.graph
    taps = [replace(tap, value=renamed.get(tap.value, tap.value)) for tap in graph.taps]
    student.rewire(steps, output=renamed.get(graph.output), taps=taps)
    return student


def _is_free(module: Operator) -> bool:
    return isinstance(module, LayoutMove | MaxPooling | Concat)


def _key(module: Operator, inputs: tuple[str, ...]) -> tuple[str, str, tuple[str, ...]]:
    return type(module).__name__, json.dumps(module.spec(), sort_keys=True), inputs
