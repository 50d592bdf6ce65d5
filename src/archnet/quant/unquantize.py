"""Back from a quantized student to a float one: where training at few bits begins with more."""

import json

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
        same_as = step.name
        if isinstance(module, WeightedOperator):
            module.weight_quantizer = module.bias_quantizer = None
        elif isinstance(module, Activation):
            module.quantizer = None
            # One without bounds was a place for its quantizer and nothing else.
            same_as = step.name if module.spec() else inputs[0]
        elif isinstance(module, LayoutMove | MaxPooling | Concat):
            # What was made twice, on finer values and on narrower ones, is one again.
            same_as = seen.setdefault(_key(module, inputs), step.name)
        if same_as == step.name:
            steps.append(Step(step.name, inputs, step.origin))
        else:
            renamed[step.name] = same_as
    student.rewire(steps, renamed=renamed)
    return student


def _key(module: Operator, inputs: tuple[str, ...]) -> tuple[str, str, tuple[str, ...]]:
    return type(module).__name__, json.dumps(module.spec(), sort_keys=True), inputs
