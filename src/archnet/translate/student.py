"""A student as a translator, and what its parts are called from outside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from archnet.ops import Stepwise, Student, WeightedOperator
from archnet.translate.search import State

POSITION = "position"


class StudentTranslator:
    """Runs the parts of a student, quantized or not.

    Args:
        parts: from `archnet.convert.stepwise`. Weights are rounded once, here.
    """

    def __init__(self, parts: Stepwise) -> None:
        self.parts = parts
        self._baked = Baked(parts.encoder), Baked(parts.decoder)

    def start(self, source_BS: Tensor) -> State:
        parts, encoder = self.parts, self._baked[0]
        memory = encoder.run({"source": source_BS}, parts.memory)
        state = dict(zip(parts.memory, memory, strict=True))
        shapes = parts.decoder.graph.shapes
        for name in parts.states:
            # Before the first token a window sees zeros, and attention nothing.
            shape = (
                shapes[name] if len(shapes[name]) == 2 else (shapes[name][0], 0, shapes[name][2])
            )
            state[name] = memory[0].new_zeros(len(source_BS), *shape)
        state[POSITION] = source_BS.new_zeros(len(source_BS), 1)
        return state

    def step(self, tokens_B: Tensor, state: State) -> tuple[Tensor, State]:
        states = self.parts.states
        values = {"target": tokens_B[:, None], **state}
        scores, *after = self._baked[1].run(
            values, [*self.parts.decoder.graph.outputs, *states.values()]
        )
        grown = dict(zip(states, after, strict=True))
        return scores[:, 0], {**state, **grown, POSITION: state[POSITION] + 1}


class Baked:
    """A student whose weights are rounded to their grids once instead of at every call."""

    def __init__(self, student: Student) -> None:
        self.student = student
        self._parameters: dict[str, tuple[Tensor, Tensor]] = {}

    def run(self, values: Mapping[str, Tensor], targets: Any) -> list[Tensor]:
        """As `Student.run`."""
        if not self._parameters:
            with torch.no_grad():
                for step in self.student.graph.steps:
                    module = self.student.operator(step.name)
                    if isinstance(module, WeightedOperator):
                        rounded = module.parameters_on_grid()
                        self._parameters[step.name] = rounded[0].clone(), rounded[1].clone()
        held = []
        for name, (weight, bias) in self._parameters.items():
            module = self.student.operator(name)
            assert isinstance(module, WeightedOperator)
            held.append((module, module.parameters_on_grid))
            module.parameters_on_grid = lambda w=weight, b=bias: (w, b)  # type: ignore[method-assign,misc]
        try:
            return self.student.run(values, targets)
        finally:
            for module, _ in held:
                del module.parameters_on_grid
