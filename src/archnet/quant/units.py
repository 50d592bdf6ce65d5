"""How large a step of its grid is for every trained number of a student."""

from collections.abc import Mapping

import torch
from torch import Tensor

from archnet.ops import (
    AFFINE,
    Activation,
    LayoutMove,
    Step,
    Student,
    WeightedOperator,
)
from archnet.quant.quantizers import ActivationLSQ, Quantizer

CHANNEL_SHARE = 1 / 8  # of a step that counts as one for a scale that moves a channel of weights


def rounded_by(
    student: Student, consumers: Mapping[str, list[Step]], step: Step
) -> Quantizer | None:
    """The quantizer that rounds what a step computes, behind layout moves; None if nothing does.

    Args:
        student: any student.
        consumers: its `consumers()`.
        step: one of its steps.
    """
    name = step.name
    while len(readers := consumers.get(name, [])) == 1:
        module = student.operator(readers[0].name)
        if isinstance(module, Activation):
            return module.quantizer if isinstance(module.quantizer, Quantizer) else None
        if not isinstance(module, LayoutMove):
            return None
        name = readers[0].name
    return None


def grid_steps(student: Student) -> dict[str, Tensor]:
    """For every parameter that lies on a grid, by name, the size of one step of that grid.

    A weight's step is the scale of its output channel (else channels of small weights would
    leave their grid while others cross one level) times the root of the share of the layer's
    weights that are not zero: where an addition is merged, one weight in a hundred is one, and a
    step of every zero would be noise of many times the layer's own size. A bias's step is the
    scale of the grid that the layer's result is rounded to. The logarithm of a scale has taken a
    step when the outermost level of its grid has moved by one: 1 / the largest integer. For
    weights, whose scale moves a whole channel at once, an eighth of that counts as a step: with
    more, blocks at 2 bits drifted away from their teacher instead of towards it.

    Returns:
        Positive sizes that broadcast to their parameter: (O, 1, ...) for weights with a scale per
        channel, else ().

    Example (2-bit weights of scale 0.1, a quarter of them not zero, and a 4-bit result of scale
    0.5, unsigned): weight 0.05, bias 0.5, log-scale of the weights 1/16, of the result 1/15.
    """
    consumers = student.consumers()
    sizes: dict[str, Tensor] = {}
    for step in student.graph.steps:
        module, path = student.operator(step.name), f"operators.{step.name}"
        target = rounded_by(student, consumers, step)
        if isinstance(module, WeightedOperator) and isinstance(module.weight_quantizer, Quantizer):
            quantizer, weight = module.weight_quantizer, module.weight.detach()
            share = (quantizer.integers(weight) != 0).float().mean()
            sizes[f"{path}.weight"] = (quantizer.along(weight) * share.sqrt()).detach()
        if isinstance(module, WeightedOperator | AFFINE) and target is not None:
            sizes[f"{path}.bias"] = target.scale.detach().reshape(())
    for name, quantizer in student.named_modules():
        if isinstance(quantizer, Quantizer):
            part = 1.0 if isinstance(quantizer, ActivationLSQ) else CHANNEL_SHARE
            size = part / max(quantizer.high, -quantizer.low)
            sizes[f"{name}.log_scale"] = torch.tensor(size, device=quantizer.log_scale.device)
    return {name: size for name, size in sizes.items() if bool((size > 0).all())}
