"""The lowerings of each whole operator, and the choice of the cheapest."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from archnet.lower.draft import Draft, Parts
from archnet.ops import Operator

# What a way builds: the name of a value, parts of one, or None where it does not apply.
Result = str | Parts | None
Build = Callable[[Any, tuple[str, ...], Draft], Result]


@dataclass(frozen=True)
class Way:
    """One lowering. ``build(operator, inputs, draft)`` adds deployed steps to the draft."""

    name: str
    build: Build


WAYS: dict[type[Operator], list[Way]] = {}


def lowering(operator: type[Operator]) -> Callable[[Build], Build]:
    """Register a lowering of ``operator``; the first one registered is the operator itself."""

    def register(build: Build) -> Build:
        WAYS.setdefault(operator, []).append(Way(build.__name__.replace("_", " "), build))
        return build

    return register


def cheapest(
    ways: list[Way],
    operator: Any,
    inputs: tuple[str, ...],
    draft: Draft,
    *,
    in_parts: bool,
    chosen: dict[str, int],
    known: str = "",
) -> tuple[Way, bool]:
    """The lowering to use, and whether the target runs it.

    It is the operator itself if the target runs that, otherwise the cheapest that it runs, and
    the operator itself again if it runs none.

    Args:
        ways: to choose from.
        operator: what is lowered.
        inputs: names of the deployed values that it reads.
        draft: that holds them; nothing is added to it.
        in_parts: whether a result in parts will do.
        chosen: what was chosen before for equal operators.
        known: what else of the operator a way asks for.
    """
    read = [draft.shapes[name] for name in inputs]
    quantized = draft.quantizer is not None
    kind = f"{type(operator).__name__} {json.dumps(operator.spec())} {known}"
    key = f"{kind} {read} {in_parts} {quantized}"
    if key not in chosen:
        found = -1, float("inf")
        for index, way in enumerate(ways):
            trial = draft.trial()
            result = way.build(operator, inputs, trial)
            if result is None or (isinstance(result, Parts) and not in_parts) or trial.misfit:
                continue
            if trial.cycles < found[1]:
                found = index, trial.cycles
            if index == 0:
                break  # a target that has the operator keeps it
        chosen[key] = found[0]
    index = chosen[key]
    return ways[max(index, 0)], index >= 0
