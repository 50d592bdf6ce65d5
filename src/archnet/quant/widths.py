"""Which width everything has that a student multiplies.

Widths are named by steps: of a weighted layer the bits of its weights, of an activation the bits
of its grid. Activations whose values meet in a concatenation share a grid; the first one names it.
"""

from collections.abc import Mapping

import torch

from archnet.ops import (
    Activation,
    Softmax,
    Student,
    TokenEmbedding,
    WeightedOperator,
)
from archnet.quant.attach import QuantizationError, grids, multiplies, shared_grids

FLOAT = 32


def uniform_widths(
    student: Student,
    weight_bits: int,
    act_bits: int,
    first_bits: int = 8,
    last_bits: int = 8,
    sum_bits: int = 8,
    per_channel: bool = True,
    softmax_bits: int = 1,
) -> dict[str, int]:
    """One width for all weights and one for all activations, but for the first and last layer.

    Args:
        student: with a place for every activation (`insert_activations`).
        weight_bits, act_bits: widths 1 to 8, or 32 for float.
        first_bits, last_bits: of weights and input of the first and last trained layer. A grid
            that other values share takes the widest of what they ask for. Without effect on
            weights, or activations, where those between are float.
        sum_bits: least width of what no trained layer multiplies: what additions, norms and
            averages alone read; and of constant weights (`width_for`).
        per_channel: whether every output channel has a scale of its own.
        softmax_bits: least width of what a softmax gives.
    """
    ends = _ends(student, first_bits, last_bits)
    widths: dict[str, int] = {}
    for name, module in weighted(student).items():
        bits = weight_bits if weight_bits == FLOAT else ends.get(name, weight_bits)
        widths[name] = width_for(module, bits, sum_bits, per_channel)
    wide = dict.fromkeys(_not_multiplied(student), max(act_bits, sum_bits))
    wide |= dict.fromkeys(_of_softmax(student), max(act_bits, softmax_bits))
    for name, group in shared_grids(student).items():
        bits = act_bits if act_bits == FLOAT else (wide | ends).get(name, act_bits)
        widths[group] = max(bits, widths.get(group, 0))
    return widths


def end_names(student: Student) -> set[str]:
    """The layers and grids whose width ``first_bits`` and ``last_bits`` decide."""
    shared = shared_grids(student)
    return {shared.get(name, name) for name in _ends(student, 0, 0)}


def merged(uniform: Mapping[str, int], chosen: Mapping[str, int]) -> dict[str, int]:
    """``uniform`` where ``chosen`` says nothing.

    Raises:
        QuantizationError: ``chosen`` holds a name that has no width here, or no width.
    """
    for name, bits in chosen.items():
        if name not in uniform:
            raise QuantizationError(
                f"widths: {name} is neither a weighted layer of this student nor the first "
                "activation of those that share a grid"
            )
        if bits != FLOAT and not 1 <= bits <= 8:
            raise QuantizationError(
                f"widths: {name}={bits} is not a width: 1 to 8, or 32 for float"
            )
    return {**uniform, **chosen}


def weighted(student: Student) -> dict[str, WeightedOperator]:
    """The layers with weights, by step, in order."""
    return {
        step.name: module
        for step in student.graph.steps
        if isinstance(module := student.operator(step.name), WeightedOperator)
    }


def width_for(
    module: WeightedOperator, bits: int, sum_bits: int = 1, per_channel: bool = True
) -> int:
    """The width of a layer's weights where those of trained layers have ``bits``.

    That is 2 for 1 where a weight is zero: an identity, a lane of a grouped layer. Constants, which
    no training fits to their grid, have at least ``sum_bits``, unless those of each scale are one
    number, its negative and zero, as in an addition: they are exact at any width.
    """
    magnitudes = module.weight.detach().abs()
    if not module.trainable and bits < sum_bits:
        rows = magnitudes.reshape(len(magnitudes) if per_channel else 1, -1)
        largest = rows.amax(1, keepdim=True).expand_as(rows)
        if not bool(((rows == 0) | torch.isclose(rows, largest)).all()):
            return sum_bits
    return 2 if bits == 1 and bool((magnitudes == 0).any()) else bits


def _not_multiplied(student: Student) -> list[str]:
    """Grids that no trained layer reads, nor a result of the network; nor one that shares them."""
    on_grid, shared = grids(student), shared_grids(student)
    multiplied = {place for name in student.graph.outputs for place in on_grid[name]}
    for step in student.graph.steps:
        if multiplies(student.operator(step.name)):
            multiplied.update(*(on_grid[name] for name in step.inputs))
    groups = {shared[name] for name in multiplied}
    return [name for name, group in shared.items() if group not in groups]


def _of_softmax(student: Student) -> list[str]:
    """Grids of what a softmax gives."""
    operators = {step.name: student.operator(step.name) for step in student.graph.steps}
    return [
        step.name
        for step in student.graph.steps
        if isinstance(operators[step.name], Activation)
        and isinstance(operators.get(step.inputs[0]), Softmax)
    ]


def _ends(student: Student, first_bits: int, last_bits: int) -> dict[str, int]:
    """Own widths of the weights of the first layer and of the last one before each result, and of
    the activations that they read.
    """
    first, last, behind = first_and_last(student)
    found = dict.fromkeys(last, last_bits) | dict.fromkeys(first, first_bits)
    on_grid = grids(student)
    for step in student.graph.steps:
        if step.name in (*first, *last):
            found |= dict.fromkeys(on_grid[step.inputs[0]], found[step.name])
        if step.name in behind and isinstance(student.operator(step.name), Activation):
            found[step.name] = last_bits
    return found


def first_and_last(student: Student) -> tuple[list[str], list[str], set[str]]:
    """The first trained layer, the last one before each result, and the steps behind the latter."""
    trained = [name for name, module in weighted(student).items() if module.trainable]
    # Token embeddings all read the input.
    embeddings = [name for name in trained if isinstance(student.operator(name), TokenEmbedding)]
    last, behind = list[str](), set[str]()
    for output in student.graph.outputs:
        if output in student.graph.inputs:
            continue
        names = [step.name for step in student.steps_between(student.graph.inputs, [output])]
        layers = [place for place, name in enumerate(names) if name in trained]
        if layers:
            last.append(names[layers[-1]])
            behind.update(names[layers[-1] + 1 :])
    return embeddings or trained[:1], list(dict.fromkeys(last)), behind
