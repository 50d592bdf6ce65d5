"""A translating student in two parts, as it is used: an encoder, and a decoder of one token a call.

While training, a student reads whole sentences. Decoding runs what depends on the source once and
the rest for every token, with a state in place of the positions before it. Both parts share the
operators of the student that they come from, weights and quantizers included.
"""

from __future__ import annotations

from archnet.ops import (
    Concat,
    History,
    Operator,
    Reshape,
    Slice,
    Softmax,
    Step,
    Stepwise,
    Student,
    StudentGraph,
    Window,
)

PAST = 8  # earlier tokens for which shapes are given where their number is free


def stepwise(student: Student) -> Stepwise:
    """Take a translating student apart; see `Stepwise`."""
    graph = student.graph
    of_target = {"target"}
    for step in graph.steps:
        if of_target & set(step.inputs):
            of_target.add(step.name)
    decoder_steps = [step for step in graph.steps if step.name in of_target]
    encoder_steps = [step for step in graph.steps if step.name not in of_target]
    of_source = {step.name for step in encoder_steps}
    memory = tuple(
        dict.fromkeys(name for step in decoder_steps for name in step.inputs if name in of_source)
    )
    encoder = _encoder(student, encoder_steps, memory)
    decoder, states = _decoder(student, decoder_steps, memory)
    return Stepwise(encoder, decoder, memory, states)


def _encoder(student: Student, steps: list[Step], memory: tuple[str, ...]) -> Student:
    """Without padding there are no marks to read."""
    kept = [Step(s.name, _without_marks(s.inputs), s.origin) for s in steps]
    graph = StudentGraph(
        inputs=["source"],
        outputs=[memory[0]],
        steps=kept,
        shapes={"source": student.graph.shapes["source"]},
        indices=["source"],
        target=student.graph.target,
    )
    return _made(student, graph, {})


def _decoder(
    student: Student, steps: list[Step], memory: tuple[str, ...]
) -> tuple[Student, dict[str, str]]:
    shapes = student.graph.shapes
    inputs = {"target": (1,), "position": (1,)} | {name: shapes[name] for name in memory}
    made: dict[str, Operator] = {}
    rewritten: list[Step] = []
    states: dict[str, str] = {}

    def add(name: str, operator: Operator, *read: str, origin: str) -> str:
        made[name] = operator
        rewritten.append(Step(name, read, origin))
        return name

    for step in steps:
        operator, name, origin = student.operator(step.name), step.name, step.origin
        read = _without_marks(step.inputs)
        if read[0] == "target":
            rewritten.append(Step(name, (*read, "position"), origin))
        elif isinstance(operator, Window):
            past = f"{name}_past"
            inputs[past] = (operator.before, shapes[read[0]][-1])
            seen = add(f"{name}_seen", Concat(1), past, *read, origin=origin)
            width = (operator.before + 1) * shapes[read[0]][-1]
            add(name, Reshape((1, width)), seen, origin=origin)
            states[past] = add(
                f"{name}_next", Slice(1, 1, operator.before + 1), seen, origin=origin
            )
        elif isinstance(operator, History):
            past = f"{name}_past"
            heads, _, width = shapes[read[0]]
            inputs[past] = (heads, PAST, width)
            states[past] = add(name, Concat(2), past, *read, origin=origin)
        elif isinstance(operator, Softmax):
            add(name, Softmax(), *read, origin=origin)
        else:
            rewritten.append(Step(name, read, origin))
    graph = StudentGraph(
        inputs=list(inputs),
        outputs=student.graph.outputs,
        steps=rewritten,
        shapes=inputs,
        indices=["target", "position"],
        classes=student.graph.classes,
        target=student.graph.target,
    )
    return _made(student, graph, made), states


def _made(student: Student, graph: StudentGraph, made: dict[str, Operator]) -> Student:
    modules = {
        step.name: made.get(step.name) or student.operator(step.name) for step in graph.steps
    }
    part = Student(graph, modules)
    part.measure()
    return part.train(student.training)


def _without_marks(inputs: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in inputs if name != "pad")
