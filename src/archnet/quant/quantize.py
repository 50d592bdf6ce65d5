"""`quantize`: put quantizers into a student and calibrate them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from archnet.ops import (
    Activation,
    Student,
    Summing,
    WeightedOperator,
)
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
    lowest_level,
    make_room_for_biases,
    observe_grids,
    require_finite,
)
from archnet.quant.quantizers import ActivationLSQ, Quantizer
from archnet.quant.widths import FLOAT, merged, uniform_widths, weighted, width_for

Method = Literal["lsq", "dorefa"]
KINDS = {
    "lsq": ("WeightLSQ", "ActivationLSQ"),
    "dorefa": ("WeightDoReFa", "ActivationDoReFa"),
}


@dataclass(frozen=True)
class Recipe:
    """How quantizers are built; `quantize` says what each field means."""

    method: Method = "lsq"
    per_channel: bool = True
    power_of_two: bool = False
    act_power_of_two: bool = False
    zero_points: bool = True

    def weights(self, module: WeightedOperator, bits: int) -> dict[str, Any]:
        """The description, for `attach`, of a quantizer of a layer's weights."""
        return {
            "kind": KINDS[self.method][0],
            "bits": bits,
            "channels": module.weight.shape[0] if self.per_channel else 1,
            "power_of_two": self.power_of_two,
        }

    def activations(self, bits: int, samples: Tensor) -> dict[str, Any]:
        """The description, for `attach`, of a quantizer of activations like these."""
        power_of_two = self.power_of_two or self.act_power_of_two
        return {
            "kind": KINDS[self.method][1],
            "bits": bits,
            "low": lowest_level(samples, bits, power_of_two, self.zero_points),
            "power_of_two": power_of_two,
        }

    def same_kind(self, spec: Mapping[str, Any] | None, quantizer: Quantizer) -> bool:
        """Whether a quantizer is like the described one, but for where its grid begins."""
        if spec is None or "like" in spec:
            return False
        if self.zero_points and "low" in spec:
            spec = {**spec, "low": quantizer.low}
        return quantizer.spec() == spec


def quantize(
    student: Student,
    weight_bits: int,
    act_bits: int,
    calibration: Iterable[Tensor | tuple[Tensor, ...]],
    *,
    method: Method = "lsq",
    first_bits: int = 8,
    last_bits: int = 8,
    sum_bits: int = 8,
    per_channel: bool = True,
    power_of_two: bool = False,
    act_power_of_two: bool = False,
    zero_points: bool = True,
    widths: Mapping[str, int] | None = None,
    learned: Mapping[str, Quantizer] | None = None,
) -> Student:
    """Quantize a student in place, with scales of least squared error.

    Args:
        student: from `convert`; not quantized before.
        weight_bits, act_bits: widths 1 to 8, or 32 for float.
        calibration: unlabelled batches (B, C, H, W), or tuples of all inputs of the student.
        method: "lsq" (learned steps) or "dorefa" (tanh weights, fixed ranges).
        first_bits, last_bits: width of weights and input of the first and of the last trained
            layer; 32 leaves them float, and they are float where the layers between are.
        sum_bits: least width of what no trained layer multiplies. Where it is more than
            ``act_bits``, an addition reads the finer values, which are rounded again for the
            convolution beside it; the literature has such additions in floats. Constant
            weights have it as well, but for those that any width holds exactly (`width_for`).
        per_channel: a weight scale for every output channel, or one for the layer.
        power_of_two: scales are powers of two, for chips that requantize by shifts.
        act_power_of_two: those of activations are, for chips that ask it of these alone.
        zero_points: activations below 8 bits may have more levels on one side of zero than on
            the other (`ActivationLSQ`).
        widths: of single layers and grids by step, as `allocate` chooses them; what they do not
            name has the widths above.
        learned: by step (`quantizers`), of the student as it was trained before. Where width and
            kind are the same as now, their grids are taken as they are, without calibration.

    Raises:
        QuantizationError: a width is impossible, the student is quantized already, or weights or
            values are not finite or beyond what float32 can scale (naming the step).
    """
    for key, bits in (
        ("weight_bits", weight_bits),
        ("act_bits", act_bits),
        ("first_bits", first_bits),
        ("last_bits", last_bits),
    ):
        if bits != FLOAT and not 1 <= bits <= 8:
            raise QuantizationError(f"{key}={bits} is not a width: 1 to 8, or 32 for float")
    if not 1 <= sum_bits <= 8:
        raise QuantizationError(f"sum_bits={sum_bits} is not a width of sums: 1 to 8")
    if describe(student):
        raise QuantizationError("the student is quantized already; convert the teacher again")
    require_finite(student)
    insert_activations(student, fine_sums=act_bits < sum_bits)
    ends = (first_bits, last_bits)
    own = uniform_widths(student, weight_bits, act_bits, *ends, sum_bits, per_channel)
    own = merged(own, widths) if widths is not None else own
    shared = shared_grids(student)
    samples, results = observe_grids(student, shared, calibration)
    student.graph.output_ranges = [(float(x.min()), float(x.max())) for x in results]
    recipe = Recipe(method, per_channel, power_of_two, act_power_of_two, zero_points)
    for module in student.operators.values():
        if power_of_two and isinstance(module, Summing):
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
