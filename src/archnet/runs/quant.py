"""The quantization of a run: at uniform widths, or at widths chosen under a budget."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor

import archnet
from archnet.config import Config, offered
from archnet.hardware import Target, student_cost
from archnet.lower import check_layers, check_memory
from archnet.ops import Student
from archnet.quant import Allocation, Quantizer, Recipe, allocate, prepare
from archnet.quant.sensitivity import Batch

_log = logging.getLogger(__name__)


def run_quant(
    config: Config,
    student: Student,
    batches: Sequence[Batch],
    learned: Mapping[str, Quantizer],
) -> dict[str, Any]:
    """Quantize and calibrate a run's student in place, if its config says so; then check it.

    What the target cannot hold ends the run here, before anything is trained.

    Args:
        config: of the run.
        student: float.
        batches: unlabelled.
        learned: what the student was trained with before, by step (`quantize`).

    Returns:
        Under a budget, what was chosen and why, for ``metrics.json``; else {}.

    Raises:
        QuantizationError: the budget cannot be met.
        TargetError: a layer is beyond a limit of the target, or needs more memory than it has.
    """
    target = Target.of(config.hardware)
    # Geometry first: it is known without any calibration.
    check_layers(student, target)
    chosen = _quantize(config, student, batches, learned)
    check_layers(student, target)
    check_memory(student, target)
    return chosen


def _quantize(
    config: Config,
    student: Student,
    batches: Sequence[Batch],
    learned: Mapping[str, Quantizer],
) -> dict[str, Any]:
    quant = config.quant
    if quant.method == "none":
        return {}
    recipe = recipe_of(config)
    if quant.budget is None:
        archnet.quantize(student, recipe, calibration=batches, learned=learned)
        return {}
    learned = prepare(student, recipe, batches, learned)
    chosen = allocate(
        student,
        first_inputs(batches, quant.sensitivity_inputs),
        {row.name: row.macs for row in student_cost(student).steps},
        recipe,
        budget=quant.budget,
        budget_of=cast(Any, quant.budget_of),
        weight_widths=offered(quant, config.hardware.weight_bits),
        act_widths=offered(quant, config.hardware.act_bits),
        free_ends=quant.free_ends,
    )
    archnet.quantize(student, recipe, calibration=batches, widths=chosen.widths, learned=learned)
    _log.info(
        "mixed widths: %.4f of the %s at W%dA%d",
        chosen.spent / chosen.uniform,
        quant.budget_of,
        quant.weight_bits,
        quant.act_bits,
    )
    return _described(student, chosen)


def recipe_of(config: Config) -> Recipe:
    """How a run quantizes: its `quant`, and what its target asks of scales and grids."""
    quant, target = config.quant, config.hardware
    return Recipe(
        weight_bits=quant.weight_bits,
        act_bits=quant.act_bits,
        first_bits=quant.first_bits,
        last_bits=quant.last_bits,
        sum_bits=quant.sum_bits,
        softmax_bits=quant.softmax_bits,
        method=cast(Any, quant.method),
        per_channel=quant.per_channel,
        power_of_two=target.requantization == "power_of_two",
        act_power_of_two=target.act_scales == "power_of_two",
        zero_points=target.zero_points,
        equalize=quant.equalize,
        copies=quant.copies,
    )


def first_inputs(batches: Sequence[Batch], count: int) -> list[Batch]:
    """The first ``count`` inputs, in batches; fewer if there are no more."""
    found: list[Batch] = []
    for batch in batches:
        if count <= 0:
            break
        rows = batch if isinstance(batch, Tensor) else batch[0]
        found.append(
            batch[:count] if isinstance(batch, Tensor) else tuple(x[:count] for x in batch)
        )
        count -= len(rows)
    return found


def _described(student: Student, chosen: Allocation) -> dict[str, Any]:
    """An allocation as plain data: a row for everything that has a width, in the student's order.

    ``loss`` of a width is a KL divergence in nats; what had no choice has an empty one.
    """
    cost = {row.name: row for row in student_cost(student).steps}
    return {
        "share": chosen.spent / chosen.uniform,
        "smallest_share": chosen.smallest / chosen.uniform,
        "inputs": chosen.inputs,
        "widths": [
            {
                "name": step.name,
                "operator": cost[step.name].operator,
                "origin": step.origin,
                "macs": cost[step.name].macs,
                "bits": chosen.widths[step.name],
                "loss": {str(b): loss for b, loss in chosen.losses.get(step.name, {}).items()},
            }
            for step in student.graph.steps
            if step.name in chosen.widths
        ],
    }
