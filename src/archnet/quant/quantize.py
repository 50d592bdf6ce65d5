"""`quantize`: put quantizers into a student and calibrate them."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from archnet.ops import (
    Activation,
    Concat,
    FullyConnected,
    LayoutMove,
    Step,
    Student,
    TokenEmbedding,
    WeightedOperator,
)
from archnet.quant.attach import (
    QuantizationError,
    attach,
    describe,
    grids,
    insert_activations,
    shared_grids,
)
from archnet.quant.calibrate import (
    activation_scale,
    calibrate_weights,
    observe,
    placed_activations,
)
from archnet.quant.quantizers import ActivationLSQ

FLOAT = 32
Method = Literal["lsq", "dorefa"]
KINDS = {
    "lsq": ("WeightLSQ", "ActivationLSQ"),
    "dorefa": ("WeightDoReFa", "ActivationDoReFa"),
}


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
    names = placed_activations(student)
    samples = observe(student, names, calibration)
    first, last = _first_and_last(student)
    weight_kind, act_kind = KINDS[method]

    widths = _activation_widths(student, first, last, act_bits, first_bits, last_bits)
    activations: dict[str, dict[str, object]] = {}
    shared = shared_grids(student)
    signed = _signed_groups(student, shared, samples) if act_bits != FLOAT else {}
    for name in names:
        if widths[name] == FLOAT:
            continue
        if shared[name] != name:
            activations[name] = {"like": shared[name]}
        else:
            activations[name] = {
                "kind": act_kind,
                "bits": widths[name],
                "signed": signed[name],
                "power_of_two": power_of_two,
            }
    weights: dict[str, dict[str, object]] = {}
    for step in student.graph.steps:
        module = student.operator(step.name)
        if not isinstance(module, WeightedOperator):
            continue
        bits = weight_bits
        if weight_bits != FLOAT and step.name in (*first, last):
            bits = first_bits if step.name in first else last_bits
        if bits == FLOAT:
            continue
        if bits == 1 and bool((module.weight == 0).any()):
            bits = 2  # an identity or a lane of a grouped layer needs a level at zero
        channels = module.weight.shape[0] if per_channel else 1
        weights[step.name] = {
            "kind": weight_kind,
            "bits": bits,
            "channels": channels,
            "power_of_two": power_of_two,
        }
    attach(student, {"activations": activations, "weights": weights})
    calibrate_weights(student)
    _calibrate_activations(student, names, shared, samples)
    return student


def _first_and_last(student: Student) -> tuple[list[str], str | None]:
    """The trained layers that read the input, token embeddings among them, and the one nearest to
    the result.
    """
    trained = [
        step.name
        for step in student.graph.steps
        if isinstance(module := student.operator(step.name), WeightedOperator) and module.trainable
    ]
    if not trained:
        return [], None
    embeddings = [name for name in trained if isinstance(student.operator(name), TokenEmbedding)]
    return embeddings or trained[:1], trained[-1]


def _activation_widths(
    student: Student,
    first: list[str],
    last: str | None,
    act_bits: int,
    first_bits: int,
    last_bits: int,
) -> dict[str, int]:
    """Bits of every activation step; what meets in a concat has one width, the widest."""
    names = placed_activations(student)
    if act_bits == FLOAT:
        return dict.fromkeys(names, FLOAT)
    widths = dict.fromkeys(names, act_bits)
    on_grid = grids(student)
    reached_last = False
    for step in student.graph.steps:
        if step.name in (*first, last):
            for name in on_grid[step.inputs[0]]:
                widths[name] = first_bits if step.name in first else last_bits
        if reached_last and step.name in widths:
            widths[step.name] = last_bits
        reached_last = reached_last or step.name == last
    shared = shared_grids(student)
    return {
        name: max(widths[other] for other in names if shared[other] == shared[name])
        for name in names
    }


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


def _calibrate_activations(
    student: Student, names: list[str], shared: dict[str, str], samples: dict[str, Tensor]
) -> None:
    for group in sorted(set(shared.values())):
        module = student.operator(group)
        assert isinstance(module, Activation)
        if not isinstance(module.quantizer, ActivationLSQ):
            continue
        values = torch.cat([samples[name] for name in names if shared[name] == group])
        module.quantizer.set_scale(activation_scale(values, module.quantizer))
