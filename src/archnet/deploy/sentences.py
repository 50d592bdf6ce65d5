"""A translating student as it is deployed: an encoder for any length, and a decoder's step.

Both are lowered for the student's target. A decoder without attention relates a token to each
source position, so their number is fixed there: `columns`. What it costs, its integer model and
its files are those of these two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from archnet.deploy.integer import IntegerGrid, IntegerModel, Kind, integers_of
from archnet.deploy.writer import ExportError
from archnet.hardware.cost import Cost, StepCost, student_cost
from archnet.lower import Lowered, SampleCost, lower
from archnet.ops import (
    Activation,
    MatMul,
    Softmax,
    SourcePool,
    Stepwise,
    Student,
    TokenEmbedding,
)
from archnet.quant import Quantizer, grids

POSITION = "position"


def columns_of(student: Student) -> int | None:
    """Source positions of a decoder that relates to each of them; None where any number goes.

    They are a power of two, because 2x2 max-pooling halves them until one is left.
    """
    if not any(isinstance(m, SourcePool) for m in student.operators.values()):
        return None
    return 1 << (embedding_of(student).positions - 1).bit_length()


def embedding_of(student: Student) -> TokenEmbedding:
    """The table of a student's tokens and positions."""
    return next(m for m in student.operators.values() if isinstance(m, TokenEmbedding))


@dataclass(frozen=True)
class Sentences:
    """Encoder and decoder as the target runs them.

    Attributes:
        parts: of the whole student.
        encoder, decoder: lowered; the results are all values of ``parts.memory``, and the scores
            with the next states, in the order of ``parts.states``.
        columns: see `columns_of`.
    """

    parts: Stepwise
    encoder: Lowered
    decoder: Lowered
    columns: int | None

    @classmethod
    def of(
        cls,
        parts: Stepwise,
        target: Any = None,
        *,
        weights: bool = True,
        length: int | None = None,
        past: int | None = None,
        fixed: bool = False,
    ) -> Sentences:
        """
        Args:
            parts: of the student.
            target: as in `archnet.lower.lower`.
            weights: as there.
            length: source positions that the shapes are for; None: those of the parts.
            past: tokens before this one that the shapes are for, likewise.
            fixed: whether the encoder is for sentences of this length alone.
        """
        encoder = _with_results(parts.encoder, parts.memory)
        decoder = _with_results(
            parts.decoder, [*parts.decoder.graph.outputs, *parts.states.values()]
        )
        columns = columns_of(decoder)
        if length is not None:
            encoder = _with_inputs(encoder, {"source": (length,)})
        wide = length if columns is None else columns
        shapes = dict(decoder.graph.shapes)
        sizes: dict[str, tuple[int, ...]] = {}
        for name in parts.memory:
            sizes[name] = _with_positions(shapes[name], wide)
        for name in parts.states:
            if len(shapes[name]) == 3:
                sizes[name] = _with_positions(shapes[name], past)
        decoder = _with_inputs(decoder, sizes)
        return cls(
            parts,
            lower(encoder, target, weights=weights, free=not fixed),
            lower(decoder, target, weights=weights, free=columns is None),
            columns,
        )

    @cached_property
    def memory(self) -> dict[str, str]:
        """The encoder's deployed value for each of the decoder's inputs."""
        return {name: self.encoder.values[name] for name in self.parts.memory}

    @cached_property
    def states(self) -> dict[str, str]:
        """The decoder's deployed value for each state at the next token."""
        return {name: self.decoder.values[value] for name, value in self.parts.states.items()}

    @property
    def scores(self) -> str:
        """The decoder's deployed value of the scores."""
        return self.decoder.student.graph.outputs[0]

    def start(self, name: str) -> tuple[int, ...]:
        """The shape of a state before the first token: attention begins without a past, a window
        with zeros.
        """
        shape = self.decoder.student.graph.shapes[name]
        return shape if len(shape) == 2 else (shape[0], 0, shape[2])

    def state_quantizers(self) -> dict[str, tuple[str, Quantizer] | None]:
        """What rounds the values that join a state, and its step; None where they are float."""
        student = self.decoder.student
        return {name: _rounded_by(student, result) for name, result in self.states.items()}

    def input_bits(self) -> dict[str, int]:
        """Bits of the decoder's memory and states, where they are on grids."""
        found = self.state_quantizers()
        for name, value in self.memory.items():
            found[name] = _rounded_by(self.encoder.student, value)
        return {name: item[1].bits for name, item in found.items() if item is not None}

    @property
    def in_floats(self) -> list[str]:
        """The operators that a target computes in its own arithmetic, each once."""
        modules = (
            *self.encoder.student.operators.values(),
            *self.decoder.student.operators.values(),
        )
        kinds = (type(m).__name__ for m in modules if isinstance(m, MatMul | Softmax))
        return sorted(set(kinds))

    def integers(
        self, requantization: Kind = "multiplier", accumulator: int | None = None
    ) -> tuple[IntegerModel, IntegerModel]:
        """Encoder and decoder in integers.

        Raises:
            ExportError: as `archnet.deploy.to_integers` says.
        """
        encoder = integers_of(self.encoder.student, requantization, accumulator)
        given: dict[str, IntegerGrid] = {}
        for place, name in enumerate(self.parts.memory):
            value = encoder.outputs[place]
            if value not in encoder.grids:
                raise ExportError(
                    f"the encoder's {name} is float: an integer model needs quant.act_bits of 8 "
                    "or less"
                )
            given[name] = encoder.grids[value]
        for name, found in self.state_quantizers().items():
            if found is None:
                raise ExportError(
                    f"the decoder's {name} is float: an integer model needs quant.act_bits of 8 "
                    "or less"
                )
            place_name, quantizer = found
            module = self.decoder.student.operator(place_name)
            assert isinstance(module, Activation)
            lowest, highest = quantizer.bounds(module.low, module.high)
            given[name] = IntegerGrid(float(quantizer.scale.detach()), lowest, highest)
        return encoder, integers_of(self.decoder.student, requantization, accumulator, given)


def _rounded_by(student: Student, value: str) -> tuple[str, Quantizer] | None:
    """The first step that rounds what a value is made of, and its quantizer."""
    for place in sorted(grids(student)[value]):
        module = student.operator(place)
        if isinstance(module, Activation) and isinstance(module.quantizer, Quantizer):
            return place, module.quantizer
    return None


def require_integers(sentences: Sentences, form: str) -> None:
    """
    Raises:
        ExportError: the target computes some of it in its own arithmetic.
    """
    if sentences.in_floats:
        raise ExportError(
            f"form={form} has integers alone, and this student's attention "
            f"({', '.join(sentences.in_floats)}) is computed in floats: convert with "
            "hardware=arch5, whose relations need none"
        )


def _with_results(student: Student, results: Sequence[str]) -> Student:
    graph = replace(student.graph, outputs=list(results), classes=[], output_names=[])
    return Student(graph, dict(student.operators.items()))  # type: ignore[arg-type]


def _with_inputs(student: Student, shapes: Mapping[str, tuple[int, ...]]) -> Student:
    graph = replace(student.graph, shapes={**student.graph.shapes, **shapes})
    changed = Student(graph, dict(student.operators.items()))  # type: ignore[arg-type]
    changed.measure()
    return changed


def _with_positions(shape: tuple[int, ...], count: int | None) -> tuple[int, ...]:
    """(T, C) or (H, T, D) with another T."""
    if count is None:
        return shape
    place = len(shape) - 2
    return (*shape[:place], count, *shape[place + 1 :])


def sentence_cost(parts: Stepwise, source: int, target: int) -> SampleCost:
    """What the deployed files compute for a sentence: the encoder once, the decoder at every token.

    A decoder without attention computes all its columns at every token, however short the source;
    one with attention as many positions as there are. Weights count once.

    Args:
        parts: of the student.
        source: tokens that are read.
        target: tokens that are written.
    """
    # What a step with attention computes grows evenly with the tokens before it.
    ends = (0, target - 1)
    runs = [Sentences.of(parts, weights=False, length=source, past=past) for past in ends]
    once = student_cost(runs[0].encoder.student)
    steps = [student_cost(run.decoder.student, run.input_bits()) for run in runs]
    rows = [_summed(pair, target) for pair in zip(*(cost.steps for cost in steps), strict=True)]
    both = runs[0].encoder, runs[0].decoder
    cycles = dict(runs[0].encoder.cycles)
    for name, first in runs[0].decoder.cycles.items():
        cycles[name] = target * (first + runs[1].decoder.cycles[name]) / 2
    # What a window became in the decoder belongs to the window.
    windows = {past.removesuffix("_past") for past in parts.states}
    of_window = {f"{name}_{part}": name for name in windows for part in ("seen", "next")}
    whole = {name: of_window.get(of, of) for lowered in both for name, of in lowered.whole.items()}
    columns = runs[0].columns
    fixed = "" if columns is None else f", of which each computes {columns} source positions"
    return SampleCost(
        Cost(
            macs=once.macs + sum(row.macs for row in rows),
            bops=once.bops + sum(row.bops for row in rows),
            parameters=once.parameters + steps[0].parameters,
            weight_bytes=once.weight_bytes + steps[0].weight_bytes,
            activation_bytes=max(cost.activation_bytes or 0 for cost in (once, *steps)),
            steps=(*once.steps, *rows),
        ),
        cycles,
        whole,
        {name: way for lowered in both for name, way in lowered.ways.items()},
        {name: reason for lowered in both for name, reason in lowered.reasons.items()},
        f"a sentence of {source} tokens and {target} steps of the decoder{fixed}",
    )


def _summed(ends: Sequence[StepCost[int]], count: int) -> StepCost[int]:
    """A step's cost for ``count`` tokens, from that of the first and of the last."""
    first, last = ends
    products = [
        replace(product, count=product.count * (count if first.products == last.products else 1))
        for product in last.products
    ]
    return replace(
        last,
        macs=count * (first.macs + last.macs) // 2,
        bops=count * (first.bops + last.bops) // 2,
        products=tuple(products),
    )


class GoldenTranslator:
    """Runs the integer models of both parts; `archnet.translate.Translator`.

    Scores are the accumulators of the last layer times their unit.

    Args:
        sentences: of a quantized student.
        requantization: as the target has it.
    """

    def __init__(self, sentences: Sentences, requantization: Kind = "multiplier") -> None:
        self.sentences = sentences
        self.encoder, self.decoder = sentences.integers(requantization)
        self.unit = self.decoder.unit(self.decoder.outputs[0])[0].reshape(-1)

    def start(self, source_BS: Tensor) -> dict[str, Tensor]:
        source = source_BS.cpu().numpy()
        found = self.encoder.run_on({"source": source})
        state = {}
        for name, value in zip(self.sentences.parts.memory, self.encoder.outputs, strict=True):
            state[name] = torch.from_numpy(widened(found[value], self.sentences.columns))
        for name in self.sentences.states:
            shape = (len(source), *self.sentences.start(name))
            state[name] = torch.zeros(shape, dtype=torch.int32)
        state[POSITION] = torch.zeros(len(source), 1, dtype=torch.long)
        return state

    def integers(
        self, tokens_B: Tensor, state: Mapping[str, Tensor]
    ) -> tuple[Any, dict[str, Tensor]]:
        """The accumulators (B, V) of the scores, and the next state."""
        values = {name: tensor.numpy() for name, tensor in state.items()}
        found = self.decoder.run_on({"target": tokens_B[:, None].numpy(), **values})
        scores, *after = self.decoder.outputs
        grown = {
            name: torch.from_numpy(np.ascontiguousarray(found[value]))
            for name, value in zip(self.sentences.states, after, strict=True)
        }
        return found[scores][:, 0], {**state, **grown, POSITION: state[POSITION] + 1}

    def step(self, tokens_B: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        sums, after = self.integers(tokens_B, state)
        return torch.from_numpy((sums * self.unit).astype(np.float32)), after


def widened(memory: Any, columns: int | None) -> Any:
    """Memory (B, S, C) with its last position repeated, which changes no maximum."""
    more = 0 if columns is None else columns - memory.shape[1]
    return np.pad(memory, ((0, 0), (0, more), (0, 0)), "edge") if more else memory
