"""Ways to train a student that are tried on few steps, and the one that goes on with many."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeVar

from archnet.config import DistillConfig

A = TypeVar("A")

SHARE = 16  # of a round's steps, its first trials have one
LEAST_STEPS = 20  # of a trial
SPREAD = 10**0.5  # from one rate on trial to the next
# Points of agreement that rounding takes, and the rate, in steps of the grid, that suits then: a
# MobileNetV3 that loses 30 wants 0.1, networks with copies, which lose 1 or 2, 0.003 to 0.01.
LOST, RATE = 3.0, 0.01
# Of the middle one of three. At 2 bits, where rounding takes nearly all, 0.03 is better than 0.1,
# and 0.3 throws weights about.
LEAST_RATE, MOST_RATE = 0.002, 0.05
FLOAT_RATES = (1e-4, 3e-4, 1e-3)
# Keys of `distill` for students of tensors where nobody has set them. They start near their
# teacher, where the adapters make no difference and cost steps; decisions, by which a search
# judges, weigh more than features; weights that leave zero are rounded back to it.
PRESET: Mapping[str, Any] = MappingProxyType(
    {"attention": False, "adaptation": False, "logits_weight": 4.0, "keep_zeros": True}
)


@dataclass(frozen=True)
class Arm:
    """A way to train: a schedule and a learning rate.

    Attributes:
        schedule: joint or local, as in `distill.schedule`.
        rate: of quantized numbers in steps of their grid; of a float student's numbers as they are.
        is_float: which of the two.
    """

    schedule: str
    rate: float
    is_float: bool = False

    def __str__(self) -> str:
        return f"{self.schedule}, rate {self.rate:.3g}"

    def options(self, base: DistillConfig, steps: int) -> DistillConfig:
        """The options of a training of so many steps."""
        own = base.optimizer
        optimizer = replace(own, lr=self.rate) if self.is_float else replace(own, grid_lr=self.rate)
        return replace(
            base,
            schedule=self.schedule,
            steps=steps,
            joint_steps=min(base.joint_steps or 0, steps) or None,
            inputs="student" if self.schedule == "local" else base.inputs,
            optimizer=optimizer,
            val_every=max(1, steps),  # a search measures on its own
        )

    def slower(self) -> Arm:
        """The arm for a student that this one has trained already: all layers, half the rate."""
        return replace(self, schedule="joint", rate=self.rate / 2)


def rates(lost: float) -> list[float]:
    """Rates worth a trial where rounding has taken so many points of agreement."""
    centre = min(MOST_RATE, max(LEAST_RATE, RATE * max(lost, 0.0) / LOST))
    return [_two_digits(centre * factor) for factor in (1 / SPREAD, 1.0, SPREAD)]


def _two_digits(number: float) -> float:
    return float(f"{number:.1e}")


def halved(arms: Sequence[A], steps: int, score: Callable[[A, int], float]) -> A:
    """The best arm by successive halving (Jamieson & Talwalkar 2015, arXiv 1502.07943).

    Args:
        arms: to choose from.
        steps: of the round that the winner will have.
        score: trains an arm for a number of steps and returns its agreement; more is better. The
            earlier of two equal arms wins, and one of infinite score wins at once.
    """
    left, length = list(arms), max(LEAST_STEPS, steps // SHARE)
    while len(left) > 1:
        scores = list[float]()
        for arm in left:
            scores.append(score(arm, length))
            if scores[-1] == math.inf:
                return arm
        order = sorted(range(len(left)), key=lambda place: -scores[place])
        left = [left[place] for place in order[: math.ceil(len(left) / 2)]]
        length *= 2
    return left[0]
