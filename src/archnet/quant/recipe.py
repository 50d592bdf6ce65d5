"""`Recipe`: the one description of how a student is quantized."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from torch import Tensor

from archnet.config import nearest
from archnet.ops import Student, WeightedOperator
from archnet.quant.attach import QuantizationError
from archnet.quant.calibrate import lowest_level
from archnet.quant.quantizers import Quantizer
from archnet.quant.widths import FLOAT, uniform_widths

Method = Literal["lsq", "dorefa"]
KINDS = {
    "lsq": ("WeightLSQ", "ActivationLSQ"),
    "dorefa": ("WeightDoReFa", "ActivationDoReFa"),
}


@dataclass(frozen=True)
class Recipe:
    """How a student is quantized; every field has a default.

    Fields that are None become what the target takes that the student was made for (`on`).

    Attributes:
        weight_bits, act_bits: widths 1 to 8, or 32 for float.
        first_bits, last_bits: width of weights and input of the first and of the last trained
            layer; 32 leaves them float, and they are float where the layers between are.
        sum_bits: least width of what no trained layer multiplies. Where it is more than
            ``act_bits``, an addition reads the finer values, which are rounded again for the
            convolution beside it; the literature has such additions in floats. Constant
            weights have it as well, but for those that any width holds exactly (`width_for`).
        softmax_bits: least width of what a softmax gives.
        method: "lsq" (learned steps) or "dorefa" (tanh weights, fixed ranges).
        per_channel: a weight scale for every output channel, or one for the layer.
        power_of_two: scales are powers of two, for chips that requantize by shifts.
        act_power_of_two: those of activations are, for chips that ask it of these alone.
        zero_points: activations below 8 bits may have more levels on one side of zero than on
            the other (`ActivationLSQ`).
        equalize: batch norms bring the channels of a value to one size before it is rounded to
            fewer than ``sum_bits``, where that halves the error (`archnet.quant.equalize`).
        copies: how often a trained layer is given each value, on grids a part of a step apart
            (`archnet.quant.copies`): as many times the levels, and the multiplications.

    Raises:
        QuantizationError: a field has a value that cannot be.
    """

    weight_bits: int = 8
    act_bits: int = 8
    first_bits: int = 8
    last_bits: int = 8
    sum_bits: int = 8
    softmax_bits: int = 1
    method: Method = "lsq"
    per_channel: bool | None = None
    power_of_two: bool | None = None
    act_power_of_two: bool | None = None
    zero_points: bool | None = None
    equalize: bool = True
    copies: int = 1

    def __post_init__(self) -> None:
        for key in ("weight_bits", "act_bits", "first_bits", "last_bits"):
            bits = getattr(self, key)
            if not _is_whole(bits, 1, 8) and bits != FLOAT:
                raise QuantizationError(f"{key}={bits} is not a width: 1 to 8, or 32 for float")
        if not _is_whole(self.sum_bits, 1, 8):
            raise QuantizationError(f"sum_bits={self.sum_bits} is not a width of sums: 1 to 8")
        if not _is_whole(self.softmax_bits, 1, 8):
            raise QuantizationError(f"softmax_bits={self.softmax_bits} is not a width: 1 to 8")
        if not _is_whole(self.copies, 1, 8):
            raise QuantizationError(f"copies={self.copies} is not a number of copies: 1 to 8")
        if self.method not in KINDS:
            raise QuantizationError(f"method={self.method} is not one of {', '.join(KINDS)}")

    @classmethod
    def of(cls, recipe: "Recipe | None", changes: Mapping[str, Any]) -> "Recipe":
        """A recipe with some fields changed; the defaults where there is none.

        Raises:
            QuantizationError: ``recipe`` is none, or there is no such field.
        """
        if recipe is not None and not isinstance(recipe, cls):
            raise QuantizationError(
                f"the recipe is a {type(recipe).__name__}: give archnet.Recipe(weight_bits=4, "
                "act_bits=4), or the fields by name: weight_bits=4, act_bits=4"
            )
        names = [field.name for field in fields(cls)]
        for name in changes:
            if name not in names:
                raise QuantizationError(
                    f"{name} is not a field of Recipe; nearest valid: {nearest(name, names)}"
                )
        return replace(recipe or cls(), **changes)

    def on(self, student: Student) -> "Recipe":
        """The recipe with what the student's target takes in place of every None."""
        target = student.graph.target
        taken = {
            "per_channel": "per_channel" in target.get("weight_scales", ("per_channel",)),
            "power_of_two": target.get("requantization") == "power_of_two",
            "act_power_of_two": target.get("act_scales") == "power_of_two",
            "zero_points": target.get("zero_points", True),
        }
        return replace(self, **{key: x for key, x in taken.items() if getattr(self, key) is None})

    @property
    def short(self) -> str:
        """Both widths, such as W4A4."""
        return f"W{self.weight_bits}A{self.act_bits}"

    def widths(self, student: Student) -> dict[str, int]:
        """The width of every layer and grid (`uniform_widths`)."""
        ends = (self.first_bits, self.last_bits)
        trained = (self.weight_bits, self.act_bits)
        return uniform_widths(
            student, *trained, *ends, self.sum_bits, bool(self.per_channel), self.softmax_bits
        )

    def weights(self, module: WeightedOperator, bits: int) -> dict[str, Any]:
        """The description, for `attach`, of a quantizer of a layer's weights."""
        return {
            "kind": KINDS[self.method][0],
            "bits": bits,
            "channels": module.weight.shape[0] if self.per_channel else 1,
            "power_of_two": self.power_of_two,
        }

    @property
    def acts_in_powers(self) -> bool:
        """Whether scales of activations are powers of two."""
        return bool(self.power_of_two or self.act_power_of_two)

    def activations(self, bits: int, samples: Tensor) -> dict[str, Any]:
        """The description, for `attach`, of a quantizer of activations like these."""
        return {
            "kind": KINDS[self.method][1],
            "bits": bits,
            "low": lowest_level(samples, bits, self.acts_in_powers, bool(self.zero_points)),
            "power_of_two": self.acts_in_powers,
        }

    def same_kind(self, spec: Mapping[str, Any] | None, quantizer: Quantizer) -> bool:
        """Whether a quantizer is like the described one, but for where its grid begins."""
        if spec is None or "like" in spec:
            return False
        if self.zero_points and "low" in spec:
            spec = {**spec, "low": quantizer.low}
        return quantizer.spec() == spec


def _is_whole(number: object, low: int, high: int) -> bool:
    return type(number) is int and low <= number <= high
