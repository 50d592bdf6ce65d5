"""Which taps are compared when: the three schedules as lists of periods."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from archnet.errors import ArchnetError
from archnet.ops import Student, Tap, WeightedOperator

Schedule = Literal["progressive", "joint", "local"]


class DistillError(ArchnetError):
    """Distillation cannot go on."""


class ScheduleOptions(Protocol):
    """What is read of `distill` to plan the periods."""

    schedule: str
    steps: int
    joint_steps: int | None
    joint_rate: float
    decay: float


@dataclass(frozen=True)
class Period:
    """A stretch of optimiser steps with one objective.

    Args:
        name: how logs call it.
        first, last: optimiser steps [first, last).
        weights: tap index -> weight of its loss.
        logits: whether the class scores are compared as well.
        source: None for images through the whole student; -1 for a block that reads images, i for
            a block that reads the features of tap i.
        rate: learning rate, as a share of the configured one.
    """

    name: str
    first: int
    last: int
    weights: dict[int, float]
    logits: bool
    source: int | None = None
    rate: float = 1.0

    @property
    def steps(self) -> int:
        return self.last - self.first


def plan(
    options: ScheduleOptions, taps: Sequence[str], tail_is_trained: bool, inner: int = 0
) -> list[Period]:
    """The periods of a schedule.

    - ``joint``: all taps and the logits at once, `steps` steps.
    - ``progressive`` (arXiv 2111.01135): period k compares taps 0..k with weights
      decay^(k - i); the periods before the last share half of `steps` evenly (the published
      ResNet-18 run gives them 300 of 5,410 epochs); the last has all taps and the logits.
    - ``local``: every block alone for `steps` - `joint_steps` steps, then all taps and the logits
      for `joint_steps`, with `joint_rate` times the learning rate: trained blocks are close to
      the teacher, and the full rate throws them off again. A block costs about 1/n of the
      network, so the blocks together cost as much as `steps` - `joint_steps` steps of the whole.

    Args:
        taps: names of the taps, in forward order.
        tail_is_trained: whether trained layers follow the last tap (the classifier).
        inner: how many taps inside of blocks follow those in the student's list; periods that
            compare all taps compare these, too.

    Raises:
        DistillError: the schedule needs taps and there are none.
    """
    count = len(taps)
    everything = {index: options.decay ** (count - 1 - index) for index in range(count)}
    everything |= dict.fromkeys(range(count, count + inner), 1.0)
    even = dict.fromkeys(range(count + inner), 1.0)
    if options.schedule == "joint" or options.steps == 0:
        return [Period("joint", 0, options.steps, even, True)] if options.steps else []
    if not count:
        raise DistillError(
            f"distill.schedule={options.schedule} needs taps and the teacher has none; "
            "name modules in convert.taps, or use distill.schedule=joint"
        )
    periods: list[Period] = []
    if options.schedule == "progressive":
        share = options.steps // 2 // max(1, count - 1)
        for k in range(count - 1):
            weights = {i: options.decay ** (k - i) for i in range(k + 1)}
            periods.append(Period(f"to {taps[k]}", k * share, (k + 1) * share, weights, False))
        done = (count - 1) * share
        periods.append(Period("all", done, options.steps, everything, True))
    else:
        joint_steps = options.joint_steps
        if joint_steps is None:
            joint_steps = options.steps * 3 // 8
        each = options.steps - joint_steps
        for k in range(count + tail_is_trained):
            is_tail = k == count
            periods.append(
                Period(
                    "classifier" if is_tail else taps[k],
                    k * each,
                    (k + 1) * each,
                    {} if is_tail else {k: 1.0},
                    is_tail,
                    k - 1,
                )
            )
        done = periods[-1].last
        joint = Period("joint", done, done + joint_steps, even, True, None, options.joint_rate)
        periods.append(joint)
    return [period for period in periods if period.steps > 0]


def plan_for(student: Student, options: ScheduleOptions) -> list[Period]:
    """The periods of a schedule for a student (`plan`)."""
    outer = outer_taps(student)
    source = [outer[-1].value] if outer else student.graph.inputs
    tail = student.steps_between(source, student.graph.outputs)
    operators = (student.operator(step.name) for step in tail)
    tail_is_trained = any(isinstance(op, WeightedOperator) and op.trainable for op in operators)
    inner = len(student.taps) - len(outer)
    return plan(options, [tap.path for tap in outer], tail_is_trained, inner)


def outer_taps(student: Student) -> list[Tap]:
    """The taps at which blocks begin and end; they come first in the student's list."""
    return [tap for tap in student.taps if not tap.inner]


def period_at(periods: Sequence[Period], step: int) -> Period:
    """The period that optimiser step ``step`` belongs to (the last one beyond the end)."""
    return next((p for p in periods if p.first <= step < p.last), periods[-1])
