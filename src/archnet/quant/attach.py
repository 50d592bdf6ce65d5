"""Where quantizers sit in a student, and how they are put there."""

import copy
from collections.abc import Mapping
from typing import Any

from archnet.errors import ArchnetError
from archnet.ops import (
    AFFINE,
    NATIVE,
    Activation,
    Add,
    AddConstant,
    BatchNorm,
    Concat,
    HingeLines,
    LayoutMove,
    MatMul,
    MaxPooling,
    Operator,
    PairFullyConnected,
    Softmax,
    Step,
    Student,
    Summing,
    WeightedOperator,
)
from archnet.quant.quantizers import (
    QUANTIZERS,
    ActivationLSQ,
    BiasQuantizer,
    Quantizer,
)

COMPUTING = WeightedOperator | AFFINE | Summing | NATIVE  # whose results are rounded


class QuantizationError(ArchnetError):
    """The student cannot be quantized as asked."""


def insert_activations(student: Student, fine_sums: bool = False) -> None:
    """Give every computed value an `Activation` step, so that it has a place for a quantizer.

    Where a ReLU or clip follows (through layout moves that nobody else reads), that is the place;
    elsewhere an activation without bounds is inserted. A result that nobody reads gets none, unless
    it is that of a batch norm: the chip gives its accumulators; nor does what a softmax reads,
    constants that are added to a product on the way to it included.

    Args:
        student: float.
        fine_sums: what additions, norms and averages read gets a place that trained layers do not
            share.
    """
    consumers, graph = student.consumers(), student.graph
    operators = {step.name: student.operator(step.name) for step in graph.steps}

    def has_place(name: str, raw: bool) -> bool:
        readers = consumers.get(name, [])
        if name in graph.outputs and not readers:
            return raw
        if len(readers) != 1 or name in graph.outputs:
            return False
        module = student.operator(readers[0].name)
        if isinstance(module, LayoutMove):
            return has_place(readers[0].name, raw)
        if isinstance(module, AddConstant):
            return isinstance(operators.get(name), MatMul) and are_scores(readers[0].name)
        return isinstance(module, Activation | Softmax)

    def are_scores(name: str) -> bool:
        readers = consumers.get(name, [])
        return len(readers) == 1 and isinstance(operators[readers[0].name], Softmax)

    renamed: dict[str, str] = {}
    added: dict[str, Activation] = {}
    steps: list[Step] = []

    def insert_after(name: str, origin: str) -> None:
        place = f"{name}_grid"
        steps.append(Step(place, (name,), origin))
        added[place] = Activation()
        renamed[name] = place

    for name in graph.inputs:
        if name not in graph.indices and not has_place(name, raw=False):
            insert_after(name, "")
    for step in graph.steps:
        inputs = tuple(renamed.get(name, name) for name in step.inputs)
        steps.append(Step(step.name, inputs, step.origin))
        module = student.operator(step.name)
        # What a batch norm gives are no sums of integers.
        raw = not isinstance(module, BatchNorm)
        if isinstance(module, COMPUTING) and not has_place(step.name, raw):
            insert_after(step.name, step.origin)
    student.rewire(steps, added=added, renamed=renamed)
    if fine_sums:
        _part(student)


def _part(student: Student) -> None:
    """Give what trained layers multiply grids of their own where additions read the same values.

    What an addition, a norm or an average reads as well stays on its grid, which may be finer
    (`uniform_widths`), and is rounded once more on the way to the trained layers. Layout moves
    that only those need are made on the narrower values.
    """
    shared, on_grid = shared_grids(student), grids(student)
    reads: dict[bool, set[str]] = {True: set(), False: set()}
    for step in student.graph.steps:
        if isinstance(module := student.operator(step.name), COMPUTING):
            for name in step.inputs:
                reads[multiplies(module)].update(shared[place] for place in on_grid[name])
    both = reads[True] & reads[False]
    by_name = {step.name: step for step in student.graph.steps}
    # A block starts from its tap, so what it reads has to follow from that value.
    tapped = {tap.value for tap in student.taps}
    added: dict[str, Operator] = {}
    steps: list[Step] = []

    def narrow(name: str) -> str:
        if name in student.graph.indices:
            return name  # Marks lie on no grid.
        place = f"{name}_narrow"
        if place not in added:
            module = student.operator(name)
            grown = isinstance(module, Activation) or name in tapped
            sources = (name,) if grown else tuple(map(narrow, by_name[name].inputs))
            added[place] = Activation() if grown else copy.deepcopy(module)
            steps.append(Step(place, sources, by_name[name].origin))
        return place

    for step in student.graph.steps:
        inputs = step.inputs
        if multiplies(student.operator(step.name)):
            parted = (any(shared[place] in both for place in on_grid[name]) for name in inputs)
            inputs = tuple(
                narrow(name) if is_parted else name
                for name, is_parted in zip(inputs, parted, strict=True)
            )
        steps.append(Step(step.name, inputs, step.origin))
    student.rewire(steps, added=added)
    student.drop_unread()


def multiplies(module: Operator) -> bool:
    """Whether an operator multiplies what it reads by trained weights, or by another value."""
    if isinstance(module, WeightedOperator):
        return module.trainable
    return isinstance(module, MatMul | Softmax)


def grids(student: Student) -> dict[str, frozenset[str]]:
    """For every value the `Activation` steps whose grid it lies on.

    A grid passes unchanged through layout moves and max-pooling; concatenation joins grids.
    Values that were computed and not yet rounded have none.
    """
    found: dict[str, frozenset[str]] = {name: frozenset() for name in student.graph.inputs}
    for step in student.graph.steps:
        module = student.operator(step.name)
        if isinstance(module, Activation):
            found[step.name] = frozenset([step.name])
        elif isinstance(module, LayoutMove | MaxPooling | Concat):
            found[step.name] = frozenset().union(*(found[name] for name in step.inputs))
        else:
            found[step.name] = frozenset()
    return found


def shared_grids(student: Student) -> dict[str, str]:
    """Activation steps that must share one quantizer: those whose values meet in a concat, in an
    addition, or in layers on pairs, which concatenate what they read.

    Returns a representative for every activation step (the first of its group).
    """
    parent = {
        step.name: step.name
        for step in student.graph.steps
        if isinstance(student.operator(step.name), Activation)
    }

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    on_grid = grids(student)
    met = list(on_grid.values())
    for step in student.graph.steps:
        if isinstance(student.operator(step.name), PairFullyConnected | HingeLines | Add):
            met.append(frozenset().union(*(on_grid[name] for name in step.inputs)))
    for members in met:
        first, *others = sorted(map(root, members), key=list(parent).index) or [""]
        for other in others:
            parent[root(other)] = root(first)
    return {name: root(name) for name in parent}


def input_quantizers(student: Student) -> dict[str, ActivationLSQ | None]:
    """For every step the quantizer whose grid its inputs lie on; None where they are float."""
    on_grid = grids(student)
    return {step.name: _quantizer_of(student, on_grid, step) for step in student.graph.steps}


def _quantizer_of(
    student: Student, on_grid: Mapping[str, frozenset[str]], step: Step
) -> ActivationLSQ | None:
    for place in sorted(on_grid[step.inputs[0]]):
        module = student.operator(place)
        assert isinstance(module, Activation)
        if isinstance(module.quantizer, ActivationLSQ):
            return module.quantizer
    return None


def quantizers(student: Student) -> dict[str, Quantizer]:
    """The quantizers of weights and of activations, by step; a shared one at each of its places."""
    slots = {
        step.name: getattr(module, "weight_quantizer", None) or getattr(module, "quantizer", None)
        for step in student.graph.steps
        if isinstance(module := student.operator(step.name), WeightedOperator | Activation)
    }
    return {name: module for name, module in slots.items() if isinstance(module, Quantizer)}


def describe(student: Student) -> dict[str, Any]:
    """The student's quantizers as plain data, for `attach`; {} if it has none."""
    weights: dict[str, Any] = {}
    activations: dict[str, Any] = {}
    first_holder: dict[int, str] = {}
    for step in student.graph.steps:
        module = student.operator(step.name)
        if isinstance(module, WeightedOperator) and isinstance(module.weight_quantizer, Quantizer):
            weights[step.name] = module.weight_quantizer.spec()
        elif isinstance(module, Activation) and isinstance(module.quantizer, Quantizer):
            holder = first_holder.setdefault(id(module.quantizer), step.name)
            shared = {"like": holder} if holder != step.name else module.quantizer.spec()
            activations[step.name] = shared
    return {"weights": weights, "activations": activations} if weights or activations else {}


def attach(student: Student, description: Mapping[str, Any]) -> None:
    """Put the described quantizers into the student's slots; scales come from calibration or a
    state dict afterwards.
    """
    for name, spec in description.get("activations", {}).items():
        module = student.operator(name)
        assert isinstance(module, Activation)
        if "like" in spec:
            holder = student.operator(spec["like"])
            assert isinstance(holder, Activation)
            module.quantizer = holder.quantizer
        else:
            module.quantizer = build(spec)
    for name, spec in description.get("weights", {}).items():
        weighted = student.operator(name)
        assert isinstance(weighted, WeightedOperator)
        weighted.weight_quantizer = build(spec)
    on_grid = grids(student)
    for step in student.graph.steps:
        weighted = student.operator(step.name)
        if isinstance(weighted, WeightedOperator):
            source = _quantizer_of(student, on_grid, step)
            if source is not None and isinstance(weighted.weight_quantizer, Quantizer):
                weighted.bias_quantizer = BiasQuantizer(weighted.weight_quantizer, source)


def build(spec: Mapping[str, Any]) -> Quantizer:
    """The quantizer that `Quantizer.spec` described, not yet calibrated."""
    arguments = dict(spec)
    kind = arguments.pop("kind")
    return QUANTIZERS[kind](**arguments)


def pack(student: Student) -> dict[str, Any]:
    """A student as plain data and tensors: safe to save, and to load without unpickling code."""
    return {
        "architecture": student.spec(),
        "quantizers": describe(student),
        "state": student.state_dict(),
    }


def unpack(packed: Mapping[str, Any]) -> Student:
    """The student that `pack` gave, in eval mode."""
    student = Student.from_spec(packed["architecture"])
    attach(student, packed["quantizers"])
    student.load_state_dict(packed["state"])
    return student.eval()
