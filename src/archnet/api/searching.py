"""`archnet.search`: from a promise to the student that keeps it, on loaders, without a config."""

import copy
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from archnet.api.comparison import Tally
from archnet.api.distilling import Trainer, schedules, trained
from archnet.config import DistillConfig, GoalConfig
from archnet.distill import captured, options_of, require_student
from archnet.errors import ConfigError
from archnet.hardware import teacher_cost
from archnet.intervals import of_pairs, standard_error, wilson
from archnet.loaders import Batches, LabelledBatch, Loadable, Takes, calibration_batches
from archnet.lower import deployed_cost
from archnet.ops import Student
from archnet.quant import (
    QuantizationError,
    Recipe,
    pack,
    quantize,
    quantizers,
    settle,
    unpack,
    unquantize,
)
from archnet.quant.quantize import require_float
from archnet.report.printed import AsTable, Printed
from archnet.runs import read_json, write_json
from archnet.runs.folder import atomic
from archnet.search import PRESET, Ledger, Measured, Promise, Search, SearchError
from archnet.search.ladder import Widths
from archnet.tensors import read_tensors


@dataclass(frozen=True, repr=False)
class Searched(AsTable):
    """What a search has found.

    Attributes:
        student: the best one within the time, settled, in eval mode.
        kept: whether it keeps the promise on the validation samples.
        sure: whether with a standard error of their number to spare.
        shortfall: points that are missing; zero or less: the promise is kept.
        measured: it beside the teacher on the validation samples.
        promise: what was asked for.
        trials: what was tried, a row each, as in ``search.json``.
        advice: what would help next, most promising first.
    """

    student: Student
    kept: bool
    sure: bool
    shortfall: float
    measured: Measured
    promise: Promise
    trials: Sequence[Mapping[str, Any]]
    advice: Sequence[str]

    def table(self) -> Printed:
        """The trials, a row each, and what became of the promise."""
        rows = [
            (
                row["name"],
                f"{row['kind']} {row['widths']}",
                f"{row['schedule']} {row['steps']:,} x {row['rate']:g}" if "rate" in row else "",
                f"{row['agreement']:.2f}",
                "" if row["drop"] is None else f"{row['drop']:.2f}",
                f"{row['seconds']:.0f}",
            )
            for row in self.trials
        ]
        said = "kept" if self.sure else "kept within the error of measuring"
        if not self.kept:
            said = f"missed by {self.shortfall:.2f} points"
        columns = ("trial", "student", "training", "agreement", "drop", "seconds")
        return Printed(f"{self.promise}: {said}", columns, rows, self.advice, left=3)


def search(
    student: Student,
    teacher: nn.Module,
    data: Loadable,
    *,
    val: Loadable,
    recipe: Recipe | None = None,
    weight_bits: int | None = None,
    act_bits: int | None = None,
    drop: float | None = None,
    agreement: float | None = None,
    minutes: float | None = 60.0,
    inputs: int = 5000,
    steps: int = 1000,
    folder: str | Path | None = None,
    accelerator: str = "auto",
    precision: str = "32-true",
    progress: bool = True,
    seed: int = 0,
    **fields: Any,
) -> Searched:
    """Quantize and train a student until it keeps a promise: `goal` of a run, from Python.

    What is tried, and when, is in docs/recipe.md.

    Args:
        student: from `convert`, float; it is left as it is.
        teacher: the network that it was converted from; it stays as it is.
        data: unlabelled, to calibrate and to train with (`archnet.loaders`). Labels are dropped.
        val: students are measured on it; without labels of classes by their agreement alone.
        recipe: of `quantize`; None: W8A8.
        weight_bits, act_bits: in place of the recipe's.
        drop: most points of accuracy below the teacher.
        agreement: least share of decisions that are the teacher's, in points.
        minutes: that all trials may take, looked at before each; None: three rounds at most.
        inputs: samples of ``val`` that are read.
        steps: of a round of training.
        folder: for students, checkpoints and ``search.json``; a call that was stopped goes on from
            there. None: a temporary folder.
        accelerator, precision, progress, seed: as in `distill`.
        fields: more keys of `distill` in the config, which are then not on trial.

    Raises:
        SearchError: nothing is promised, or results decide nothing.
        QuantizationError: the student is quantized already, or the widths are impossible.
        DistillError, TaskError, ConfigError: as in `distill`.
    """
    require_student(student, teacher)
    require_float(student)
    if drop is None and agreement is None:
        raise SearchError("nothing is promised: give drop=<points> or agreement=<points>")
    goal = GoalConfig(drop=drop, agreement=agreement, minutes=minutes, inputs=inputs)
    for name, value in (("drop", drop), ("agreement", agreement)):
        if value is not None and not 0 <= value <= 100:
            raise ConfigError(f"{name}={value:g} is no number of points: 0 to 100")
    own = recipe or Recipe()
    recipe = replace(
        own,
        weight_bits=own.weight_bits if weight_bits is None else weight_bits,
        act_bits=own.act_bits if act_bits is None else act_bits,
    )
    given = [f"distill.{name}" for name in fields]
    given += [f"distill.optimizer.{name}" for name in ("lr", "grid_lr") if name in fields]
    base = options_of({"schedule": "joint", **PRESET, "steps": steps, **fields})
    trainer = Trainer.following(student, teacher, accelerator, precision, progress)
    place = tempfile.TemporaryDirectory() if folder is None else nullcontext(str(folder))
    with place as where:
        bench = _Bench(student, teacher, data, val, recipe, inputs, trainer, Path(where), seed)
        bench.require_own()
        ledger = Ledger(bench.folder / "search.json", write_json, _rows, given)
        asked = Widths(recipe.weight_bits, recipe.act_bits)
        found = Search(bench, goal, asked, base, ledger, schedules(student)).find()
        best = bench.kept(found.point.name)
    settle(best)
    best.to(next(student.parameters()).device)
    return Searched(
        student=best.eval(),
        kept=found.shortfall <= 0,
        sure=found.is_sure,
        shortfall=found.shortfall,
        measured=found.point.measured,
        promise=Promise(drop, agreement),
        trials=ledger.rows,
        advice=found.advice,
    )


def _rows(path: Path) -> Mapping[str, Any]:
    return read_json(path, dict)


class _Bench:
    """A `Bench` on loaders; see there for what each question means."""

    def __init__(
        self,
        student: Student,
        teacher: nn.Module,
        data: Loadable,
        val: Loadable,
        recipe: Recipe,
        inputs: int,
        trainer: Trainer,
        folder: Path,
        seed: int,
    ) -> None:
        self.student, self.teacher, self.data = student, teacher, data
        self.recipe, self.inputs, self.trainer, self.seed = recipe, inputs, trainer, seed
        self.takes, self.folder = Takes.of(student), folder
        self.val = Batches(val, self.takes, "val")
        folder.mkdir(parents=True, exist_ok=True)

    def require_own(self) -> None:
        """Raise `SearchError` where the folder has the search of another student."""
        first = self.folder / "trial00.pt"
        if not first.exists():
            return
        before, now = self.kept("trial00").state_dict(), self.converted("").state_dict()
        if before.keys() != now.keys() or any(not now[k].equal(x) for k, x in before.items()):
            raise SearchError(
                f"{self.folder} has the search of another student: give a folder of its own"
            )

    @cached_property
    def _calibration(self) -> Any:
        return calibration_batches(self.data, self.takes, QuantizationError)

    @cached_property
    def _looked_at(self) -> list[LabelledBatch]:
        return self.val.first(self.inputs)

    @cached_property
    def _scored(self) -> nn.Module:
        return captured(self.teacher, self.student).scores()

    @cached_property
    def _teacher_bops(self) -> int:
        example = tuple(x[:1] for x in self.takes.example())
        return teacher_cost(self.teacher, example, 8, 8).bops

    def converted(self, closer: str) -> Student:
        return copy.deepcopy(self.student).cpu()

    def closer(self) -> list[str]:
        return []  # the caller has converted it

    def quantized(self, student: Student, widths: Widths, budget: float | None) -> Student:
        student = copy.deepcopy(student)
        learned = quantizers(student)
        unquantize(student)
        recipe = replace(self.recipe, weight_bits=widths.weight_bits, act_bits=widths.act_bits)
        return quantize(student, recipe, calibration=self._calibration, learned=learned)

    def train(self, student: Student, options: DistillConfig, place: str) -> Mapping[str, Any]:
        folder = self.folder / place
        folder.mkdir(exist_ok=True)
        data = Batches(self.data, self.takes)
        facts = trained(student, self.teacher, data, options, self.trainer, folder, self.seed)
        student.cpu()
        return {key: facts[key] for key in ("inputs_seen", "unlabelled", "earlier") if key in facts}

    def measure(self, student: Student, *, short: bool = False) -> Measured:
        tally = Tally(None, student.graph.classes)
        tally.read(self._scored, student, self._looked_at)
        if tally.agreement is None:
            raise SearchError("the results decide nothing, and a promise is a number of decisions")
        same = round(tally.inputs * tally.agreement / 100)
        error = 100 * standard_error(*wilson(same, tally.inputs))
        if not tally.labels:
            return Measured(tally.agreement, None, tally.inputs, error)
        teacher, student_right = (100 * right / tally.labels for right in tally.right)
        drop_error = 100 * standard_error(*of_pairs(tally.alone[0], tally.alone[1], tally.labels))
        return Measured(tally.agreement, teacher - student_right, tally.inputs, error, drop_error)

    def cost(self, student: Student) -> tuple[float, str]:
        return deployed_cost(student).bops / self._teacher_bops, "bops"

    def keep(self, name: str, student: Student) -> None:
        with atomic(self.folder / f"{name}.pt") as temporary:
            torch.save(pack(student), temporary)

    def kept(self, name: str) -> Student:
        return unpack(read_tensors(self.folder / f"{name}.pt"))

    def clear(self, names: list[str]) -> None:
        for name in names:
            (self.folder / f"{name}.pt").unlink(missing_ok=True)
            shutil.rmtree(self.folder / name, ignore_errors=True)
