"""How far a student's scores move when one layer or one grid alone is rounded."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from archnet.ops import Operator, Student
from archnet.ops.scores import Loss, each
from archnet.quant.attach import build, shared_grids
from archnet.quant.calibrate import activation_scale, observe_grids, weight_scale
from archnet.quant.quantizers import Quantizer
from archnet.quant.recipe import Recipe
from archnet.quant.widths import weighted

Batch = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class _Trial:
    """One quantizer, and the slots of the operators that it goes to."""

    bits: int
    operators: Sequence[Operator]
    slot: str
    quantizer: Quantizer

    @contextmanager
    def in_place(self) -> Iterator[None]:
        for operator in self.operators:
            setattr(operator, self.slot, self.quantizer)
        try:
            yield
        finally:
            for operator in self.operators:
                setattr(operator, self.slot, None)


def sensitivity(
    student: Student,
    batches: Iterable[Batch],
    offers: Mapping[str, Sequence[int]],
    recipe: Recipe | None = None,
) -> dict[str, dict[int, float]]:
    """Round one layer's weights, or one grid of activations, and measure what the scores lose.

    Everything else stays float, so the figure is the layer's own:

        loss(layer, b) = E_x KL(softmax f(x) || softmax f_{layer at b bits}(x))

    over unlabelled x, with the scales that `quantize` starts from. Of a result without classes it
    is the share of variance that is no longer explained (`archnet.ops.scores.Loss`); of several
    results the losses are added. ZeroQ (Cai et
    al. 2020, arXiv 2001.00281, section 3.2) measures layers so; HAWQ (Dong et al. 2019, arXiv
    1905.03696) and HAWQ-V2 (1911.03852) estimate the same from the Hessian, to second order.

    A trial is run from the layer it begins at; what comes before is computed once for all. The
    cost is at most one forward pass for each layer, grid and width, and about half of one on
    average. Memory is that of one batch.

    Args:
        student: float, with a place for every activation (`insert_activations`).
        batches: unlabelled (B, C, H, W), or tuples of all inputs.
        offers: the widths to try, by weighted layer and by the first activation of a shared grid.
        recipe: which quantizers.

    Returns:
        For every offer by name and width the divergence, in nats a decision (an input, a position).
    """
    batches = list(batches)
    trials = _trials(student, batches, offers, (recipe or Recipe()).on(student))
    graph = student.graph
    lost = {
        name: {trial.bits: [Loss(axis) for axis in graph.classes] for trial in tried}
        for name, tried in trials.items()
    }
    device = next(student.parameters()).device
    last_read = {name: step.name for step in student.graph.steps for name in step.inputs}
    with torch.no_grad():
        for batch in batches:
            inputs = [x.to(device) for x in ((batch,) if isinstance(batch, Tensor) else batch)]
            references = each(student(*inputs))
            live = dict(zip(student.graph.inputs, inputs, strict=True))
            for step in student.graph.steps:
                for trial in trials.get(step.name, ()):
                    with trial.in_place():
                        results = student.run(live, graph.outputs)
                    losses = lost[step.name][trial.bits]
                    for loss, scores, reference in zip(losses, results, references, strict=True):
                        loss.add(scores, reference)
                live[step.name] = student.operator(step.name)(*[live[n] for n in step.inputs])
                for name in set(step.inputs):
                    if last_read[name] == step.name and name not in graph.outputs:
                        del live[name]
    return {
        name: {bits: sum(loss.value for loss in losses) for bits, losses in found.items()}
        for name, found in lost.items()
    }


def _trials(
    student: Student, batches: Sequence[Batch], offers: Mapping[str, Sequence[int]], recipe: Recipe
) -> dict[str, list[_Trial]]:
    """A calibrated quantizer for every width on offer, by the step at which it begins to act."""
    shared = shared_grids(student)
    seen, _ = observe_grids(student, shared, batches)
    device = next(student.parameters()).device
    trials: dict[str, list[_Trial]] = {name: [] for name in offers}
    for name, module in weighted(student).items():
        for bits in offers.get(name, ()):
            quantizer = build(recipe.weights(module, bits)).to(device)
            quantizer.set_scale(weight_scale(quantizer, module))
            trials[name].append(_Trial(bits, [module], "weight_quantizer", quantizer))
    for group, samples in seen.items():
        members = [student.operator(name) for name in shared if shared[name] == group]
        for bits in offers.get(group, ()):
            quantizer = build(recipe.activations(bits, samples)).to(device)
            quantizer.set_scale(activation_scale(samples, quantizer))
            trials[group].append(_Trial(bits, members, "quantizer", quantizer))
    return trials
