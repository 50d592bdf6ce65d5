"""Lowering: every whole operator of a student, written with what its target runs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from archnet.hardware.cost import Cost, student_cost
from archnet.hardware.estimate import estimate
from archnet.hardware.target import Target
from archnet.lower import convolution
from archnet.lower.draft import Draft, Parts
from archnet.lower.registry import WAYS, cheapest
from archnet.ops import Activation, LayoutMove, Operator, Step, Student
from archnet.quant.attach import input_quantizers
from archnet.quant.quantizers import Quantizer


@dataclass(frozen=True)
class Lowered:
    """A student as its target runs it.

    Attributes:
        student: of deployed operators. Quantizers are those of the whole one, shared with it.
        whole: the whole step that each deployed step belongs to.
        ways: for each whole step that is not written as itself, the lowering that was used.
        reasons: of each of those, why it is not written as itself.
        values: the deployed value that each value of the whole student is, where there is one: a
            result that is rounded before its parts are joined has none before the rounding.
        misfits: of whole steps that the target runs in no way, why it does not run them as they
            are, which is how they are written.
        cycles: of each deployed step, by the target's own costs (`archnet.hardware.estimate`).
    """

    student: Student
    whole: Mapping[str, str]
    ways: Mapping[str, str]
    reasons: Mapping[str, str]
    values: Mapping[str, str]
    misfits: Mapping[str, str]
    cycles: Mapping[str, float]


def lower(
    student: Student, target: Any = None, *, weights: bool = True, free: bool | None = None
) -> Lowered:
    """Write each operator of a student with what a target runs, by the cheapest lowering.

    What the deployed graph computes is what the student computes: equal in floats but for the
    order of sums, equal to the bit in integers.

    Args:
        student: float or quantized; it stays as it is, and shares its quantizers and those
            operators that stay as they are.
        target: a name or description; None: that which the student was made for.
        weights: False: layers that are written in another way are on the meta device, which is
            enough to count what they cost.
        free: whether positions are those of a sentence of any length; None: they are where the
            student reads token numbers. False: as many as the shapes of its inputs say.
    """
    target = target_of(student) if target is None else Target.of(target)
    free = bool(student.graph.indices) if free is None else free
    return _Lowering(student, target, weights, free).run()


def deployed(student: Student, target: Any = None) -> Student:
    """The student of `lower` alone."""
    return lower(student, target).student


def deployed_cost(student: Student, target: Any = None) -> Cost[int]:
    """What a student costs as its target runs it (`archnet.hardware.student_cost`)."""
    return student_cost(lower(student, target, weights=False).student)


@dataclass(frozen=True)
class SampleCost:
    """What a student costs as it is deployed, for one sample.

    Attributes:
        cost: of all deployed steps.
        cycles: of each, by the target's own costs.
        whole: the whole step that each belongs to.
        ways, reasons: as of `Lowered`.
        about: what the sample is, where that has to be said; "" else.
    """

    cost: Cost[int]
    cycles: Mapping[str, float]
    whole: Mapping[str, str]
    ways: Mapping[str, str]
    reasons: Mapping[str, str]
    about: str = ""


def sample_cost(student: Student) -> SampleCost:
    """The cost of a student that is one file."""
    lowered = lower(student, weights=False)
    cost = student_cost(lowered.student)
    return SampleCost(cost, lowered.cycles, lowered.whole, lowered.ways, lowered.reasons)


def target_of(student: Student) -> Target:
    """The target that a student was made for; arch5 where it does not say."""
    fields = student.graph.target
    return Target.described(fields) if fields else Target.named("arch5")


class _Lowering:
    """One walk along the student."""

    def __init__(self, student: Student, target: Target, weights: bool, free: bool) -> None:
        self.student, self.target = student, target
        self.readers = student.consumers()
        self.quantizers = input_quantizers(student)
        graph = student.graph
        device = next((p.device for p in student.parameters()), torch.device("cpu"))
        shapes = {name: graph.shapes[name] for name in graph.inputs}
        self.draft = Draft(target, device, shapes, is_dry=not weights, is_free=free)
        # Names of the student's own values are kept for these.
        self.draft.reserved.update(step.name for step in graph.steps)
        self.values = {name: name for name in graph.inputs}
        self.ways: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self.misfits: dict[str, str] = {}
        self.done: set[str] = set()

    def run(self) -> Lowered:
        graph, draft = self.student.graph, self.draft
        for step in graph.steps:
            if step.name not in self.done:
                self._step(step)
        changed = replace(
            graph,
            outputs=[self.values[name] for name in graph.outputs],
            steps=draft.steps,
            shapes=dict(draft.shapes),
            taps=[],
            target={},
        )
        student = Student(changed, draft.modules).eval()
        cycles = estimate(draft.steps, draft.modules, draft.shapes, self.target.costs)
        return Lowered(
            student, draft.whole, self.ways, self.reasons, self.values, self.misfits, cycles
        )

    def _step(self, step: Step) -> None:
        operator, draft = self.student.operator(step.name), self.draft
        inputs = tuple(self.values[name] for name in step.inputs)
        draft.step, draft.quantizer, draft.notes = step, self.quantizers[step.name], []
        ways = WAYS.get(type(operator))
        if ways is None:
            shape = self.student.graph.shapes[step.name]
            self.values[step.name] = draft.emit("", operator, *inputs, name=step.name, shape=shape)
            return
        chain = self._rounding(step)
        way, fits = cheapest(
            ways,
            operator,
            inputs,
            draft,
            in_parts=chain is not None or draft.quantizer is None,
            chosen=draft.chosen,
            known=str(convolution.is_shared(operator)),
        )
        result = way.build(operator, inputs, draft) if fits else None
        if result is None:
            self.misfits[step.name] = self._reason(operator, inputs)
            result = draft.emit("", operator, *inputs, name=step.name)
        if draft.modules.get(step.name) is not operator:
            self.ways[step.name] = ", ".join([way.name, *dict.fromkeys(draft.notes)])
            self.reasons[step.name] = self._reason(operator, inputs)
        if isinstance(result, str):
            self.values[step.name] = draft.named(result, step.name)
        elif chain is None or draft.quantizer is None:
            pieces = zip(result.names, result.bounds, strict=True)
            names = [self._clipped(name, *bounds) for name, bounds in pieces]
            joined = draft.concat(names, result.axis)
            self.values[step.name] = draft.named(joined, step.name)
        else:
            self._round_parts(result, chain)

    def _reason(self, operator: Operator, inputs: tuple[str, ...]) -> str:
        """Why the target does not run an operator as it is."""
        trial = self.draft.trial()
        trial.emit("", operator, *inputs)
        return trial.misfit or "no single operator computes it"

    def _rounding(self, step: Step) -> list[Step] | None:
        """The moves after a step and the activation that rounds its result; None where others
        read it, or nothing rounds it.
        """
        found, name = list[Step](), step.name
        kept = set(self.student.graph.outputs)
        while name not in kept and len(readers := self.readers.get(name, [])) == 1:
            (reader,) = readers
            found.append(reader)
            module = self.student.operator(reader.name)
            if isinstance(module, Activation):
                return found if isinstance(module.quantizer, Quantizer) else None
            if not isinstance(module, LayoutMove):
                return None
            name = reader.name
        return None

    def _clipped(self, name: str, low: float, high: float) -> str:
        if (low, high) == (-math.inf, math.inf):
            return name
        return self.draft.emit("act", Activation(low, high), name)

    def _round_parts(self, parts: Parts, chain: list[Step]) -> None:
        """Round each part right after its layer, then join them and make the moves."""
        *moves, end = chain
        activation, draft = self.student.operator(end.name), self.draft
        assert isinstance(activation, Activation)
        rounded = []
        for part, (low, high) in zip(parts.names, parts.bounds, strict=True):
            place = Activation(max(low, activation.low), min(high, activation.high))
            place.quantizer = activation.quantizer
            rounded.append(draft.emit("act", place, part))
        name = draft.concat(rounded, parts.axis)
        for move in moves:
            name = draft.emit("move", self.student.operator(move.name), name)
        self.values[end.name] = draft.named(name, end.name)
        self.done.update(step.name for step in chain)
