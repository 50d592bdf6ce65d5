"""What is promised, and what measures whether it is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from archnet.config import DistillConfig
from archnet.errors import ArchnetError
from archnet.ops import Student
from archnet.search.ladder import Widths


class SearchError(ArchnetError):
    """A goal that cannot be searched for."""


@dataclass(frozen=True)
class Measured:
    """A student beside its teacher on validation inputs, in points.

    Attributes:
        agreement: decisions that are the teacher's, 0 to 100.
        drop: how far the task's metric is below the teacher's; None: the inputs have no labels, or
            it was not asked for.
        inputs: how many were compared.
        agreement_error, drop_error: their standard errors; 0 where they are not known.
    """

    agreement: float
    drop: float | None
    inputs: int
    agreement_error: float = 0.0
    drop_error: float = 0.0

    @property
    def told(self) -> str:
        """The drop in words; empty: not known."""
        if self.drop is None:
            return ""
        side = "below" if self.drop >= 0 else "above"
        return f"{abs(self.drop):.2f} points {side} the teacher"

    def facts(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Promise:
    """What a student has to reach on validation inputs; each None is not asked for.

    Attributes:
        drop: most points of the task's metric below the teacher.
        agreement: least share of decisions that are the teacher's, in points.
    """

    drop: float | None = None
    agreement: float | None = None

    def shortfall(self, measured: Measured, errors: float = 0.0) -> float:
        """How many points are missing; zero or less: the promise is kept.

        Without labels a drop is not known. A decision that changes costs at most one right answer,
        so that the drop is at most the share of changed decisions, which has to be within the
        promise then.

        Args:
            measured: a student.
            errors: standard errors that are to lie between what was measured and what was promised.

        """
        missing = []
        if self.drop is not None:
            drop, error = measured.drop, measured.drop_error
            if drop is None:
                drop, error = 100 - measured.agreement, measured.agreement_error
            missing.append(drop + errors * error - self.drop)
        if self.agreement is not None:
            agreement = measured.agreement - errors * measured.agreement_error
            missing.append(self.agreement - agreement)
        return round(max(missing), 6)

    def __str__(self) -> str:
        parts = []
        if self.drop is not None:
            parts.append(f"at most {self.drop:g} points below the teacher")
        if self.agreement is not None:
            parts.append(f"an agreement of at least {self.agreement:g} %")
        return " and ".join(parts)


class Bench(Protocol):
    """What a search works with: students are made, trained, measured, costed and kept here."""

    def converted(self, closer: str) -> Student:
        """The float student as conversion made it: one of `closer`, or, "", as it was asked for."""

    def closer(self) -> list[str]:
        """Names of conversions that approximate the teacher more closely, at more cost, in the
        order in which they are worth a trial.
        """

    def quantized(self, student: Student, widths: Widths, budget: float | None) -> Student:
        """A student at other widths, calibrated.

        Args:
            student: float or quantized; it is left as it is. What training taught its weights and
                grids is kept where it still applies.
            widths: of weights and activations.
            budget: None: these widths everywhere; else single layers get more bits where that
                saves most error, up to so many times the cost of these widths.
        """

    def train(self, student: Student, options: DistillConfig, place: str) -> Mapping[str, Any]:
        """Train a student in place; from its last checkpoint if ``place`` was begun before.

        Returns:
            ``inputs_seen``, and ``earlier``, seconds of sessions before.
        """

    def measure(self, student: Student, *, short: bool = False) -> Measured:
        """The student on validation inputs; after a ``short`` trial perhaps without its drop."""

    def cost(self, student: Student) -> tuple[float, str]:
        """What it costs on the target, as a multiple of the teacher's cost there at the width that
        a teacher has, and the measure: bops, or cycles, which fewer bits do not lower.
        """

    def keep(self, name: str, student: Student) -> None:
        """Keep a student for `kept`."""

    def kept(self, name: str) -> Student:
        """A student that was kept."""

    def clear(self, names: list[str]) -> None:
        """Remove what was kept under these names."""
