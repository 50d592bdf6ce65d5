"""`quantize`: put quantizers into a student and calibrate them."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from archnet.loaders import Loadable, Takes, calibration_batches
from archnet.ops import Activation, Student, Summing
from archnet.quant.attach import (
    QuantizationError,
    attach,
    describe,
    insert_activations,
    quantizers,
    shared_grids,
)
from archnet.quant.calibrate import (
    activation_scale,
    calibrate_weights,
    make_room_for_biases,
    observe_grids,
    require_finite,
)
from archnet.quant.copies import copied_layers, copy_values, merge_copies
from archnet.quant.equalize import equalize
from archnet.quant.quantizers import ActivationLSQ, Quantizer
from archnet.quant.recipe import Recipe
from archnet.quant.sensitivity import Batch
from archnet.quant.widths import FLOAT, merged, weighted, width_for

_log = logging.getLogger(__name__)


def quantize(
    student: Student,
    recipe: Recipe | None = None,
    *,
    calibration: Loadable,
    widths: Mapping[str, int] | None = None,
    learned: Mapping[str, Quantizer] | None = None,
    **fields: Any,
) -> Student:
    """Quantize a student in place, with scales of least squared error.

    Args:
        student: from `convert`; not quantized before.
        recipe: widths, kinds of quantizers, equalization; W8A8 where neither it nor ``fields`` say
            otherwise.
        calibration: what `archnet.loaders` reads: a batch (B, C, H, W), a list of batches, a
            DataLoader, an iterable. Labels are dropped. A list is read whole, anything else up to
            `archnet.loaders.CALIBRATION` samples.
        widths: of single layers and grids by step, as `allocate` chooses them; what they do not
            name has the recipe's. They were chosen for the student as it is, which is then neither
            equalized nor are its values copied (`prepare` does both).
        learned: by step (`quantizers`), of the student as it was trained before. Where width and
            kind are the same as now, their grids are taken as they are, without calibration.
        fields: of the recipe, by name: ``weight_bits=4, act_bits=4``.

    Raises:
        QuantizationError: a width is impossible, the student is none or is quantized already,
            the calibration cannot be used, or weights or values are not finite or beyond what
            float32 can scale (naming the step).
    """
    recipe = Recipe.of(recipe, fields)
    require_float(student)
    recipe = recipe.on(student)
    _warn_of_widths(student, recipe)
    require_finite(student)
    batches = calibration_batches(calibration, Takes.of(student), QuantizationError)
    if widths is None:
        learned = prepare(student, recipe, batches, learned)
    insert_activations(student, fine_sums=recipe.act_bits < recipe.sum_bits)
    own = recipe.widths(student)
    own = merged(own, widths) if widths is not None else own
    shared = shared_grids(student)
    samples, results = observe_grids(student, shared, batches)
    student.graph.output_ranges = [(float(x.min()), float(x.max())) for x in results]
    for module in student.operators.values():
        if recipe.power_of_two and isinstance(module, Summing):
            module.to_power_of_two()
    activations = {
        name: {"like": group} if group != name else recipe.activations(own[name], samples[name])
        for name, group in shared.items()
        if own[group] != FLOAT
    }
    weights = {
        name: recipe.weights(module, width_for(module, own[name]))
        for name, module in weighted(student).items()
        if own[name] != FLOAT
    }
    kept = {
        name: quantizer
        for name, quantizer in (learned or {}).items()
        if recipe.same_kind((activations | weights).get(name), quantizer)
    }
    activations |= {name: q.spec() for name, q in kept.items() if name in activations}
    attach(student, {"activations": activations, "weights": weights})
    calibrate_weights(student)
    for group, values in samples.items():
        place = student.operator(group)
        assert isinstance(place, Activation)
        if isinstance(place.quantizer, ActivationLSQ):
            place.quantizer.set_scale(activation_scale(values, place.quantizer))
    for name, quantizer in quantizers(student).items():
        if name in kept:
            quantizer.load_state_dict(kept[name].state_dict())
    make_room_for_biases(student)
    return student


def _warn_of_widths(student: Student, recipe: Recipe) -> None:
    """Say so where the student's target does not compute with the recipe's widths."""
    target = student.graph.target
    for key, what in (("weight_bits", "weights"), ("act_bits", "activations")):
        bits, own = getattr(recipe, key), target.get(key, [])
        if own and bits != FLOAT and bits not in own:
            wider = min((width for width in own if width > bits), default=max(own))
            _log.warning(
                "hardware=%s has no %s of %d bits: it stores them in %d and computes as with %d",
                target.get("name", ""), what, bits, wider, wider,
            )  # fmt: skip


def require_float(student: Student) -> None:
    """Raise `QuantizationError` for what is no student, or one that has quantizers."""
    if not isinstance(student, Student):
        raise QuantizationError(
            f"a {type(student).__name__} is not a student: call convert() on it first"
        )
    if describe(student):
        raise QuantizationError("the student is quantized already; convert the teacher again")


def prepare(
    student: Student,
    recipe: Recipe,
    batches: Sequence[Batch],
    learned: Mapping[str, Quantizer] | None = None,
) -> Mapping[str, Quantizer]:
    """Equalize a student and copy its values as the recipe asks, in place, before it is quantized.

    Args:
        student: float. Copies that it has already are kept where they are what the recipe asks
            for, else merged and made anew.
        recipe: `equalize` and `copies`, and the widths to come.
        batches: unlabelled (B, C, H, W), or tuples of all inputs of the student.
        learned: as in `quantize`.

    Returns:
        What is still true of ``learned``, and the grids of new copies.
    """
    recipe = recipe.on(student)
    learned = _without_copies(student, recipe, learned or {})
    grids = {name: q for name, q in learned.items() if isinstance(q, ActivationLSQ)}
    # A student that was trained at this width has its norms already.
    is_new_width = all(grid.bits != recipe.act_bits for grid in grids.values())
    if recipe.equalize and recipe.act_bits < recipe.sum_bits and is_new_width:
        equalized = equalize(student, recipe, batches)
        _log.info("equalized: %d values get a batch norm", len(equalized))
        # Weights behind a norm are others than those that were trained.
        learned = grids if equalized else learned
    if recipe.copies == 1 or copied_layers(student):
        return learned
    copied = copy_values(student, recipe, batches)
    count = len(copied_layers(student))
    _log.info("copied: %d layers read every value %d times", count, recipe.copies)
    return {**learned, **copied}


def _without_copies(
    student: Student, recipe: Recipe, learned: Mapping[str, Quantizer]
) -> Mapping[str, Quantizer]:
    """Merge copies that the student has, unless they are what the recipe asks for; what is still
    true of ``learned``.
    """
    copied = copied_layers(student)
    acts = {q.bits for q in learned.values() if isinstance(q, ActivationLSQ)}
    weights = {learned[name].bits if name in learned else FLOAT for name in copied}
    as_asked = set(copied.values()) == {recipe.copies} and weights == {recipe.weight_bits}
    if not copied or (as_asked and recipe.act_bits in acts):
        return learned
    merge_copies(student)
    return {name: quantizer for name, quantizer in learned.items() if name not in copied}
