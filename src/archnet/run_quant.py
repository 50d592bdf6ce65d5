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
from archnet.quant import (
    ActivationLSQ,
    Allocation,
    Quantizer,
    allocate,
    copied_layers,
    copy_values,
    equalize,
    merge_copies,
)
from archnet.quant.sensitivity import Batch
from archnet.quant.widths import FLOAT

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
    uniform: dict[str, Any] = {
        "weight_bits": quant.weight_bits,
        "act_bits": quant.act_bits,
        "first_bits": quant.first_bits,
        "last_bits": quant.last_bits,
        "sum_bits": quant.sum_bits,
        "method": quant.method,
        "per_channel": quant.per_channel,
        "power_of_two": config.hardware.requantization == "power_of_two",
        "act_power_of_two": config.hardware.act_scales == "power_of_two",
        "zero_points": config.hardware.zero_points,
    }
    learned = _without_copies(config, student, learned)
    grids = {name: q for name, q in learned.items() if isinstance(q, ActivationLSQ)}
    # A student that was trained at this width has its norms already.
    new_width = all(grid.bits != quant.act_bits for grid in grids.values())
    if quant.equalize and quant.act_bits < quant.sum_bits and new_width:
        equalized = equalize(
            student,
            quant.weight_bits,
            quant.act_bits,
            batches,
            power_of_two=uniform["power_of_two"],
            act_power_of_two=uniform["act_power_of_two"],
            zero_points=uniform["zero_points"],
        )
        _log.info("equalized: %d values get a batch norm", len(equalized))
        # Weights behind a norm are others than those that were trained.
        learned = grids if equalized else learned
    learned = {**learned, **_with_copies(config, student, batches, uniform)}
    if quant.budget is None:
        archnet.quantize(student, calibration=batches, learned=learned, **uniform)
        return {}
    chosen = allocate(
        student,
        first_inputs(batches, quant.sensitivity_inputs),
        {row.name: row.macs for row in student_cost(student).steps},
        budget=quant.budget,
        budget_of=cast(Any, quant.budget_of),
        weight_widths=offered(quant, config.hardware.weight_bits),
        act_widths=offered(quant, config.hardware.act_bits),
        free_ends=quant.free_ends,
        **uniform,
    )
    archnet.quantize(student, calibration=batches, widths=chosen.widths, learned=learned, **uniform)
    _log.info(
        "widths chosen: %.4f of the %s at W%dA%d",
        chosen.spent / chosen.uniform,
        quant.budget_of,
        quant.weight_bits,
        quant.act_bits,
    )
    return _described(student, chosen)


def _without_copies(
    config: Config, student: Student, learned: Mapping[str, Quantizer]
) -> Mapping[str, Quantizer]:
    """Merge copies that an earlier run made, unless they are what the config asks for; what is
    still true of ``learned``.
    """
    quant, copied = config.quant, copied_layers(student)
    acts = {q.bits for q in learned.values() if isinstance(q, ActivationLSQ)}
    weights = {learned[name].bits if name in learned else FLOAT for name in copied}
    as_asked = set(copied.values()) == {quant.copies} and weights == {quant.weight_bits}
    if not copied or (as_asked and quant.act_bits in acts):
        return learned
    merge_copies(student)
    return {name: quantizer for name, quantizer in learned.items() if name not in copied}


def _with_copies(
    config: Config, student: Student, batches: Sequence[Batch], uniform: Mapping[str, Any]
) -> Mapping[str, Quantizer]:
    """Copy values as the config asks for, if they are not copied yet; grids of the new copies."""
    quant = config.quant
    if quant.copies == 1 or copied_layers(student):
        return {}
    keys = ("power_of_two", "act_power_of_two", "per_channel", "zero_points")
    options = {key: uniform[key] for key in keys}
    widths = (quant.weight_bits, quant.act_bits)
    found = copy_values(student, quant.copies, *widths, batches, **options)
    count = len(copied_layers(student))
    _log.info("copied: %d layers read every value %d times", count, quant.copies)
    return found


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
