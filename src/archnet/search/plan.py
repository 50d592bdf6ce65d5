"""The search: from float down the ladder of widths, with short trials before long trainings."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from archnet.config import LARGEST, DistillConfig, GoalConfig
from archnet.search.arms import FLOAT_RATES, Arm, halved, rates
from archnet.search.ladder import Widths
from archnet.search.ledger import Ledger, Row
from archnet.search.promise import Bench, Measured, Promise, SearchError

_log = logging.getLogger(__name__)

# Points of agreement that a step down may take at once; what takes more is reached by the widths
# between, so that training begins near the teacher.
FAR = 10.0
# What a step down may take without being trained before the next one.
NEAR = 1.0
# What the last step alone takes at most where widths between help. Beyond it, as by weights of 2
# bits, a student begins as far off from trained widths between as from the wider ones.
REACHED = 50.0
# Disagreement of a float student, in points, from which it is worth training before it is rounded.
FITTED = 3.0
GAIN = 0.2  # points of agreement that a round of training has to win for another to follow
ROUNDS = 3  # at one width, where no bound on time ends them
LEAST_SHARE = 4  # of a round's steps, at least one part has to fit into the time that is left
BETWEEN = 0.5  # of a round's steps, those at widths that are only passed
ERRORS = 1.0  # standard errors of a measure that a kept promise has to spare
SAME = 1.001  # a cost that is so near a bound is within it
NEVER = -math.inf  # the agreement of what was not tried
MANY = 100  # rounds, where time bounds them


@dataclass(frozen=True)
class Point:
    """A student that a trial has made, kept under the trial's name."""

    name: str
    widths: Widths
    measured: Measured
    cost: float | None = None
    steps: int = 0  # of the training that made it
    begun: str = ""  # the trial whose calibrated student was trained; empty: it is that itself

    @property
    def agreement(self) -> float:
        return self.measured.agreement


@dataclass(frozen=True)
class Found:
    """What a search ends with.

    Attributes:
        point: the best student within the bounds.
        calibrated: name of the student that its training began with.
        shortfall: points that are missing; zero or less: the promise is kept.
        is_sure: whether it is kept with a standard error of the measure to spare.
        advice: sentences about what would help next, most promising first.
    """

    point: Point
    calibrated: str
    shortfall: float
    is_sure: bool
    advice: list[str] = field(default_factory=list)


class Search:
    """Looks for the student that keeps a promise at the widths asked for.

    Args:
        bench: makes, trains and measures students.
        goal: the promise and its bounds.
        asked: the widths.
        base: `distill` of the config. A round of training has its ``steps``, or as many as fit into
            the time that is left; what is not on trial is as it says.
        ledger: keeps the trials. Keys that its user has given are not on trial.
        schedules: that the student can be trained by.
    """

    def __init__(
        self,
        bench: Bench,
        goal: GoalConfig,
        asked: Widths,
        base: DistillConfig,
        ledger: Ledger,
        schedules: Sequence[str] = ("joint",),
    ) -> None:
        self.bench, self.goal, self.asked, self.base = bench, goal, asked, base
        self.ledger, self.promise = ledger, Promise(goal.drop, goal.agreement)
        self.schedules = list(schedules)
        if ledger.names("distill.schedule", "distill"):
            self.schedules = [base.schedule]
        self.out_of_time = False
        self.last_gain: float | None = None  # of the last round at the asked widths
        # Steps and seconds, with what measuring and cached features took.
        self._taken: dict[tuple[Widths, str], list[tuple[int, float]]] = {}

    def find(self) -> Found:
        """Search until the promise is kept, the bounds are reached or training helps no more.

        Raises:
            SearchError: a bound cannot be met by any student of these widths.
        """
        point = best = self.fitted(self.converted())
        if not self.asked.is_float:
            best = self.reach(point, self.asked)
            if not self.keeps(best):
                best = self.spent(best)
        missing = self.promise.shortfall(best.measured)
        _log.info(
            "search: %s, %s after %d trials", self.promise,
            "kept" if missing <= 0 else f"missed by {missing:.2f} points", len(self.ledger.rows),
        )  # fmt: skip
        begun, sure = best.begun or best.name, self.keeps(best)
        return Found(best, begun, missing, sure, self.advice(point, best))

    def keeps(self, point: Point) -> bool:
        """Whether a student keeps the promise with a standard error to spare: the first of many
        trials that seems to keep it has been lucky more often than not.
        """
        return self.promise.shortfall(point.measured, ERRORS) <= 0

    def fulfils(self, point: Point) -> bool:
        """Whether the search is over: the promise is kept at the widths that were asked for."""
        return point.widths == self.asked and self.keeps(point)

    # Float ------------------------------------------------------------------------------------

    def converted(self) -> Point:
        """The student as conversion made it, or closer to its teacher where that is far off."""
        best = self._converted("")
        for closer in self.bench.closer():
            if 100 - best.agreement <= FITTED:
                break
            point = self._converted(closer)
            affordable = self.goal.cost is None or (point.cost or 0.0) <= self.goal.cost * SAME
            if affordable and point.agreement - best.agreement >= GAIN:
                best = point
        return best

    def _converted(self, closer: str) -> Point:
        about = {"kind": "converted", "widths": "float"} | ({"closer": closer} if closer else {})

        def work(name: str) -> Mapping[str, Any]:
            student = self.bench.converted(closer)
            self.bench.keep(name, student)
            found = self.bench.measure(student).facts()
            if closer and self.goal.cost is not None:
                quantized = self.bench.quantized(student, self.asked, None)
                found["cost"], found["cost_of"] = self.bench.cost(quantized)
            return found

        return self._point(self.ledger.trial(about, work))

    def fitted(self, start: Point) -> Point:
        """A float student whose approximations follow the teacher, where they do not yet."""
        if 100 - start.agreement <= FITTED:
            return start
        found = [self.base.optimizer.lr] if self._given("lr") else FLOAT_RATES
        arms = [Arm("joint", rate, is_float=True) for rate in found]
        # The time is for the widths that are asked for, if there are any.
        share = 1.0 if self.asked.is_float else 0.25
        trained = self.trained(start, arms, share=share, rounds=ROUNDS if share == 1 else 1)
        return self.best([start, trained])

    # Down the ladder --------------------------------------------------------------------------

    def reach(self, above: Point, widths: Widths, point: Point | None = None) -> Point:
        """The best student at some widths, from one at wider widths.

        Args:
            above: the student at wider widths.
            widths: to reach.
            point: it calibrated at these widths, where that has been done.
        """
        final = widths == self.asked
        point = point or self.calibrated(above, widths)
        if final and self.keeps(point):
            return point
        between = widths.above()
        if above.agreement - point.agreement > FAR and between is not None:
            near = self.calibrated(above, between)
            if near.agreement - point.agreement <= REACHED:
                above = self.reach(above, between, near)
                point = self.calibrated(above, widths)
                if final and self.keeps(point):
                    return point
        lost = above.agreement - point.agreement
        if not final and lost <= NEAR:
            return point
        arms = self.arms(lost)
        if final:
            return self.trained(point, arms)
        return self.trained(point, arms, steps=BETWEEN, share=0.3, rounds=1)

    def arms(self, lost: float) -> list[Arm]:
        """What is tried where rounding has taken so many points of agreement."""
        given = self.base.optimizer.grid_lr
        found = rates(lost) if not self._given("grid_lr") or given is None else [given]
        first, *others = self.schedules
        # A second schedule costs a trial, not one for every rate: rates matter more.
        middle = found[len(found) // 2]
        return [*(Arm(first, rate) for rate in found), *(Arm(s, middle) for s in others)]

    def _given(self, key: str) -> bool:
        return self.ledger.names(f"distill.optimizer.{key}")

    def calibrated(self, above: Point, widths: Widths, budget: float | None = None) -> Point:
        """A student of some widths before any training at them.

        Raises:
            SearchError: the widths that are asked for cost more than `goal.cost` allows.
        """
        about = {"kind": "calibrated", "from": above.name, "widths": str(widths)}
        if budget is not None:
            about["budget"] = f"{budget:.4g}"

        def work(name: str) -> Mapping[str, Any]:
            student = self.bench.quantized(self.bench.kept(above.name), widths, budget)
            self.bench.keep(name, student)
            found = self.bench.measure(student).facts()
            if widths == self.asked:
                found["cost"], found["cost_of"] = self.bench.cost(student)
            return found

        row = self.ledger.trial(about, work)
        cost, bound = row.get("cost"), self.goal.cost
        if bound is not None and cost is not None and budget is None and cost > bound * SAME:
            raise SearchError(
                f"goal.cost={bound:g} is less than {widths} costs on this target, {cost:.4g} times "
                "its teacher: raise goal.cost, or ask for fewer bits"
            )
        return self._point(row)

    def trained(
        self,
        start: Point,
        arms: Sequence[Arm],
        *,
        steps: float = 1.0,
        share: float = 1.0,
        rounds: int | None = None,
    ) -> Point:
        """The best student after training: short trials, then rounds of the best arm.

        Args:
            start: what is trained.
            arms: to try.
            steps: of a round, as a share of those in the config.
            share: of the time left that this may take; its trials have a third of that.
            rounds: at most; None: as many as help, within the time, or `ROUNDS` without a bound.
        """
        length = round(self.base.steps * steps)
        if not length:
            return start
        made = [start]
        now, time = self.ledger.minutes, share * self._left()

        def tried(arm: Arm, count: int) -> float:
            # All trials of a length or none: shorter ones would lose for being shorter.
            point = self.round(start, arm, count, now + time / 3, least=count)
            if point is None:
                return NEVER
            made.append(point)
            return math.inf if self.fulfils(point) else point.agreement

        arm = halved(arms, length, tried)
        source, least = start, length // LEAST_SHARE
        for _ in range(rounds or (ROUNDS if self.goal.minutes is None else MANY)):
            best = self.best(made)
            if self.fulfils(best):
                break
            # What was cut short by time may have ended early: then another round follows.
            point = self.round(source, arm, length, now + time, least=least)
            self.out_of_time = point is None or point.steps < length
            if point is None:
                break
            made.append(point)
            gain = point.agreement - best.agreement
            if point.widths == self.asked:
                self.last_gain = gain
            if gain < GAIN:
                break
            source, arm, length = point, arm.slower(), 2 * length
        best = self.best(made)
        self.bench.clear([point.name for point in made[1:] if point is not best])
        return best

    def round(
        self, start: Point, arm: Arm, steps: int, until: float, *, least: int
    ) -> Point | None:
        """A student trained once; None where there is too little time.

        Args:
            start: what is trained.
            arm: how.
            steps: how long, or shorter to end in time.
            until: minutes of the search at which it has to end.
            least: steps without which it is not worth to begin.
        """
        seconds = 60 * (until - self.ledger.minutes)
        steps = min(steps, self._affordable(start.widths, arm, seconds))
        if steps < min(least, self.base.steps) or self._left() <= 0:
            return None
        about = {
            "kind": "trained",
            "from": start.name,
            "widths": str(start.widths),
            "schedule": arm.schedule,
            "rate": arm.rate,
            "steps": steps,
        }

        def work(name: str) -> Mapping[str, Any]:
            student = self.bench.kept(start.name)
            facts = self.bench.train(student, arm.options(self.base, steps), name)
            self.bench.keep(name, student)
            short = steps < self.base.steps // LEAST_SHARE
            return {**facts, **self.bench.measure(student, short=short).facts()}

        row = self.ledger.trial(about, work)
        self._taken.setdefault((start.widths, arm.schedule), []).append(
            (row["steps"], row["seconds"])
        )
        return self._point(row, start)

    def _affordable(self, widths: Widths, arm: Arm, seconds: float) -> int:
        """Steps that end in time, by what earlier trainings of the kind have taken."""
        taken = self._taken.get((widths, arm.schedule))
        if not taken or math.isinf(seconds):
            return LARGEST
        fixed, pace = line(taken)
        return max(0, int((seconds - fixed) / pace)) if pace else LARGEST

    # More than the widths ---------------------------------------------------------------------

    def spent(self, best: Point) -> Point:
        """A student with more bits in the layers that need them most, within `goal.cost`.

        First half of what the bound leaves is spent, in proportion, then all of it.
        """
        cost, bound = best.cost, self.goal.cost
        if bound is None or cost is None or bound <= cost * SAME or self._left() <= 0:
            return best
        found = best
        for power in (0.5, 1.0):
            budget = (bound / cost) ** power
            point = self.calibrated(best, self.asked, budget)
            if not self.keeps(point):
                lost = max(best.agreement - point.agreement, 0.0)
                point = self.trained(point, self.arms(lost), rounds=1, share=power)
            found = self.best([found, point])
            if self.keeps(found):
                break
        return found

    # The end ----------------------------------------------------------------------------------

    def best(self, points: Sequence[Point]) -> Point:
        """The one nearest to the promise; of several that keep it the one that agrees most."""
        return max(
            points,
            key=lambda p: (-max(0.0, self.promise.shortfall(p.measured)), p.agreement),
        )

    def advice(self, fitted: Point, best: Point) -> list[str]:
        """What would help where the promise is missed, or kept by luck perhaps."""
        if self.keeps(best):
            return []
        found = list[str]()
        if self.promise.shortfall(best.measured) <= 0:
            found.append(
                f"The promise is kept within the error of {best.measured.inputs:,} validation "
                "inputs: more of them (task.data.val_fraction, goal.inputs) tell more"
            )
        if not self.base.steps:
            return ["distill.steps=0 trains nothing: leave it out"]
        if not self.keeps(fitted):
            found.append(
                "The float student does not surely keep the promise either: more time for it, or a "
                "target that runs more of the teacher's operators"
            )
        minutes = self.goal.minutes
        if minutes is not None and self.out_of_time:
            won = (
                ""
                if self.last_gain is None
                else f": the last round won {self.last_gain:.2f} points of agreement"
            )
            found.append(f"More time{won} (goal.minutes={2 * minutes:g})")
        wider = self.asked.above() if not self.asked.is_float else None
        if wider is not None:
            passed = self._passed(wider)
            known = (
                ""
                if passed is None
                else f", which missed it by {passed:.2f} points on the way"
                if passed > 0
                else ", which keeps it"
            )
            found.append(
                f"More bits: {wider}{known} (quant.weight_bits={wider.weight_bits} "
                f"quant.act_bits={wider.act_bits})"
            )
        cost = best.cost
        if cost is not None and (self.goal.cost is None or self.goal.cost <= cost * SAME):
            found.append(
                f"More bits in the layers that need them most: goal.cost={2 * cost:.2g} allows "
                "twice the cost"
            )
        return found

    def _passed(self, widths: Widths) -> float | None:
        """The least shortfall of all trials at some widths; None: there was none."""
        rows = [row for row in self.ledger.rows if row["widths"] == str(widths)]
        return min((self.promise.shortfall(_measured(row)) for row in rows), default=None)

    def _left(self) -> float:
        """Minutes."""
        bound = self.goal.minutes
        return math.inf if bound is None else bound - self.ledger.minutes

    def _point(self, row: Row, start: Point | None = None) -> Point:
        measured, cost = _measured(row), row.get("cost")
        _log.info(
            "%s: %s%s, agreement %.2f %%%s, %.0f s", row["name"], row["widths"],
            f", {row['schedule']} {row['steps']} steps, rate {row['rate']:g}" if start else "",
            measured.agreement,
            f", {measured.told}" if measured.drop is not None else "",
            row["seconds"],
        )  # fmt: skip
        if start is None:
            return Point(row["name"], Widths.named(row["widths"]), measured, cost)
        begun = start.begun or start.name
        return Point(row["name"], start.widths, measured, start.cost, row["steps"], begun)


def line(taken: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Seconds that a training takes whatever its length, and those of a step, from trainings.

    Of one length alone all seconds count as those of steps.

    >>> line([(20, 30.0), (60, 70.0)])
    (10.0, 1.0)
    >>> line([(20, 30.0), (20, 34.0)])
    (0.0, 1.6)
    """
    steps, seconds = (sum(column) / len(taken) for column in zip(*taken, strict=True))
    spread = sum((count - steps) ** 2 for count, _ in taken)
    slope = sum((count - steps) * (time - seconds) for count, time in taken)
    if not spread or slope <= 0 or slope / spread * steps > seconds:
        return 0.0, seconds / steps
    pace = slope / spread
    return seconds - pace * steps, pace


def _measured(row: Row) -> Measured:
    return Measured(**{item.name: row[item.name] for item in fields(Measured)})
