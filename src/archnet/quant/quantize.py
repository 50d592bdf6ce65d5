"""`quantize`: put quantizers into a student and calibrate them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from archnet.ops import (
    Activation,
    Concat,
    FullyConnected,
    LayoutMove,
    Step,
    Student,
    WeightedOperator,
)
from archnet.quant.attach import (
    QuantizationError,
    attach,
    describe,
    insert_activations,
    shared_grids,
)
from archnet.quant.calibrate import (
    activation_scale,
    calibrate_weights,
    make_room_for_biases,
    observe,
)
from archnet.quant.quantizers import ActivationLSQ
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

    def weights(self, module: WeightedOperator, bits: int) -> dict[str, Any]:
        """The description, for `attach`, of a quantizer of a layer's weights."""
        return {
            "kind": KINDS[self.method][0],
            "bits": bits,
            "channels": module.weight.shape[0] if self.per_channel else 1,
            "power_of_two": self.power_of_two,
        }

    def activations(self, bits: int, signed: bool) -> dict[str, Any]:
        """The description, for `attach`, of a quantizer of activations."""
        return {
            "kind": KINDS[self.method][1],
            "bits": bits,
            "signed": signed,
            "power_of_two": self.power_of_two or self.act_power_of_two,
        }


@dataclass(frozen=True)
class Seen:
    """What the activation quantizers of a student will see.

    By the first activation step of every shared grid: ``samples`` of its values, and whether it
    has negative ones (``signed``).
    """

    samples: Mapping[str, Tensor]
    signed: Mapping[str, bool]


def quantize(
    student: Student,
    weight_bits: int,
    act_bits: int,
    calibration: Iterable[Tensor | tuple[Tensor, ...]],
    *,
    method: Method = "lsq",
    first_bits: int = 8,
    last_bits: int = 8,
    per_channel: bool = True,
    power_of_two: bool = False,
    act_power_of_two: bool = False,
    widths: Mapping[str, int] | None = None,
) -> Student:
    """Quantize a student in place, with scales of least squared error.

    Args:
        student: from `convert`; not quantized before.
        weight_bits, act_bits: widths 1 to 8, or 32 for float.
        calibration: unlabelled batches (B, C, H, W), or tuples of all inputs of the student.
        method: "lsq" (learned steps) or "dorefa" (tanh weights, fixed ranges).
        first_bits, last_bits: width of weights and input of the first and of the last trained
            layer; 32 leaves them float, and they are float where the layers between are.
        per_channel: a weight scale for every output channel, or one for the layer.
        power_of_two: scales are powers of two, for chips that requantize by shifts.
        act_power_of_two: those of activations are, for chips that ask it of these alone.
        widths: of single layers and grids by step, as `allocate` chooses them; what they do not
            name has the widths above.

    Raises:
        QuantizationError: a width is impossible, or the student is quantized already.
    """
    for key, bits in (
        ("weight_bits", weight_bits),
        ("act_bits", act_bits),
        ("first_bits", first_bits),
        ("last_bits", last_bits),
    ):
        if bits != FLOAT and not 1 <= bits <= 8:
            raise QuantizationError(f"{key}={bits} is not a width: 1 to 8, or 32 for float")
    if describe(student):
        raise QuantizationError("the student is quantized already; convert the teacher again")
    insert_activations(student)
    own = uniform_widths(student, weight_bits, act_bits, first_bits, last_bits)
    own = merged(own, widths) if widths is not None else own
    shared = shared_grids(student)
    lift = any(own[group] != FLOAT for group in shared.values())
    seen = prepare(student, calibration, lift=lift)
    recipe = Recipe(method, per_channel, power_of_two, act_power_of_two)
    activations = {
        name: {"like": group} if group != name else recipe.activations(own[name], seen.signed[name])
        for name, group in shared.items()
        if own[group] != FLOAT
    }
    weights = {
        name: recipe.weights(module, width_for(module, own[name]))
        for name, module in weighted(student).items()
        if own[name] != FLOAT
    }
    attach(student, {"activations": activations, "weights": weights})
    calibrate_weights(student)
    for group, samples in seen.samples.items():
        place = student.operator(group)
        assert isinstance(place, Activation)
        if isinstance(place.quantizer, ActivationLSQ):
            place.quantizer.set_scale(activation_scale(samples, place.quantizer))
    make_room_for_biases(student)
    return student


def prepare(
    student: Student, calibration: Iterable[Tensor | tuple[Tensor, ...]], *, lift: bool
) -> Seen:
    """Run a float student on the batches, and shift what can be (`_lift`).

    Args:
        student: with a place for every activation (`insert_activations`).
        calibration: as in `quantize`.
        lift: whether activations will be quantized at all.
    """
    shared = shared_grids(student)
    samples = observe(student, list(shared), calibration)
    signed = _signed_groups(student, shared, samples) if lift else {}
    groups: dict[str, list[Tensor]] = {}
    for name, group in shared.items():
        groups.setdefault(group, []).append(samples[name])
    return Seen({name: torch.cat(parts) for name, parts in groups.items()}, signed)


def _signed_groups(
    student: Student, shared: dict[str, str], samples: dict[str, Tensor]
) -> dict[str, bool]:
    """Whether the group of each representative needs negative levels.

    A group of a ReLU's output and a value of both signs (the two sides of an addition) would
    give half of its levels to numbers that the ReLU never sends. There the value of both signs is
    shifted up by a constant, which the layers around it absorb in their biases (`_lift`).
    """
    negative = {name: bool(values.min() < 0) for name, values in samples.items()}
    signed = {}
    for group in sorted(set(shared.values())):
        members = [name for name, root in shared.items() if root == group]
        mixed = any(negative[n] for n in members) and not all(negative[n] for n in members)
        if mixed:
            for name in [n for n in members if negative[n]]:
                lifted = _lift(student, name, samples[name])
                if lifted is not None:
                    samples[name], negative[name] = lifted, False
        signed[group] = any(negative[name] for name in members)
    return signed


def _lift(student: Student, name: str, values: Tensor) -> Tensor | None:
    """Shift a value up by a constant c, exactly: producer's bias + c, readers' bias - W (c 1).

    Possible where one weighted layer makes the value and only fully connected layers read it
    (through layout moves and concatenations that add no zeros). The constant leaves one part in
    a thousand below zero.

    Returns:
        The shifted samples, or None where it is not possible.
    """
    by_name = {step.name: step for step in student.graph.steps}
    if any(tap.value == name for tap in student.taps) or student.graph.output == name:
        return None
    source = by_name[name].inputs[0]
    consumers = student.consumers()
    while source in by_name and isinstance(student.operator(source), LayoutMove):
        if len(consumers[source]) != 1:
            return None
        source = by_name[source].inputs[0]
    producer = student.operator(source) if source in by_name else None
    place = student.operator(name)
    assert isinstance(place, Activation)
    if not isinstance(producer, WeightedOperator) or len(consumers[source]) != 1:
        return None
    if place.low > float("-inf") or place.high < float("inf"):
        return None
    reached = _readers(student, name)
    if reached is None:
        return None
    shift = -torch.quantile(values, 0.001).item()
    corrections: list[tuple[FullyConnected, Tensor]] = []
    for step, chain in reached:
        indicator = _indicator(student, chain, name, step)
        if not bool((indicator == indicator.reshape(-1, indicator.shape[-1])[0]).all()):
            return None
        reader = student.operator(step.name)
        assert isinstance(reader, FullyConnected)
        row = indicator.reshape(-1, indicator.shape[-1])[0].to(reader.weight)
        corrections.append((reader, reader.weight.detach() @ row * shift))
    with torch.no_grad():
        producer.bias.add_(shift)
        for reader, correction in corrections:
            reader.bias.sub_(correction)
    return values + shift


def _readers(student: Student, name: str) -> list[tuple[Step, list[Step]]] | None:
    """The fully connected layers that read a value, each with the moves in between."""
    found: list[tuple[Step, list[Step]]] = []
    consumers = student.consumers()

    def follow(value: str, chain: list[Step]) -> bool:
        for step in consumers.get(value, []):
            module = student.operator(step.name)
            if isinstance(module, FullyConnected):
                found.append((step, chain))
            elif not isinstance(module, LayoutMove | Concat) or not follow(
                step.name, [*chain, step]
            ):
                return False
        return bool(consumers.get(value))

    return found if follow(name, []) else None


def _indicator(student: Student, chain: list[Step], name: str, reader: Step) -> Tensor:
    """Ones where the input of ``reader`` holds values of ``name``, zeros elsewhere."""
    values = {name: torch.ones(1, *student.graph.shapes[name])}
    for step in chain:
        inputs = [values.get(i, torch.zeros(1, *student.graph.shapes[i])) for i in step.inputs]
        values[step.name] = student.operator(step.name)(*inputs)
    return values[reader.inputs[0]]
