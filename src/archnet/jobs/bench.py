"""Where the search of a run makes, trains and measures its students: the run's job and folder."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import lightning

from archnet.config import ConvertConfig, DistillConfig
from archnet.jobs.costs import cost_ratio
from archnet.jobs.job import Facts, Inputs, Job
from archnet.ops import Student
from archnet.quant import quantizers, unquantize
from archnet.report.files import SEARCH
from archnet.runs import RunFolder, read_json, write_json
from archnet.runs.quant import run_quant
from archnet.runs.student import load_student, save_student, write_tables
from archnet.search import Found, Ledger, Measured, Search, SearchError
from archnet.search.ladder import Widths

# How the converted student is kept until the search has found the one that training began with.
CONVERTED = "calibrated"


class JobBench:
    """A `Bench` of a run; see there for what each question means."""

    def __init__(self, job: Job, named: Sequence[str]) -> None:
        self.job, self.config, self.folder = job, job.config, job.folder
        self.named = named

    @cached_property
    def _calibration(self) -> list[Inputs]:
        return self.job.calibration(self.config.quant.calibration_batches)

    def converted(self, closer: str) -> Student:
        if not closer:
            return load_student(self.folder, CONVERTED)
        student, _ = self.job.convert(self._closer[closer])
        student.graph.preprocessing = self.job.preprocessing()
        return student

    def closer(self) -> list[str]:
        return list(self._closer)

    @cached_property
    def _closer(self) -> Mapping[str, ConvertConfig]:
        if self.config.convert.student is not None:
            return {}
        return self.job.conversions(self.converted(""), self.named)

    def quantized(self, student: Student, widths: Widths, budget: float | None) -> Student:
        student = copy.deepcopy(student)
        learned = quantizers(student)
        unquantize(student)
        quant = replace(
            self.config.quant,
            weight_bits=widths.weight_bits,
            act_bits=widths.act_bits,
            budget=budget,
        )
        run_quant(replace(self.config, quant=quant), student, self._calibration, learned)
        self.job.require_computable(student)
        return student

    def train(self, student: Student, options: DistillConfig, place: str) -> Mapping[str, Any]:
        lightning.seed_everything(self.config.seed, verbose=False)
        folder = self.folder.checkpoints / place
        folder.mkdir(exist_ok=True)
        facts = self.job.distil(student, options, folder)
        return {key: facts[key] for key in ("inputs_seen", "unlabelled", "earlier") if key in facts}

    def measure(self, student: Student, *, short: bool = False) -> Measured:
        goal = self.config.goal
        # A drop in classes comes with the agreement; that of translations has to be searched for.
        drop = goal.drop is not None and not (short and self.job.drop_costs)
        found = self.job.validate(student, goal.inputs, drop=drop)
        if found["agreement"] is None:
            raise SearchError(
                f"task.kind={self.config.task.kind} has results that decide nothing, and a goal is "
                "a number of decisions or points: leave goal.drop and goal.agreement out"
            )
        return Measured(**found)

    def cost(self, student: Student) -> tuple[float, str]:
        return cost_ratio(self.job, student)

    def keep(self, name: str, student: Student) -> None:
        save_student(self.folder, name, student)

    def kept(self, name: str) -> Student:
        return load_student(self.folder, name)

    def clear(self, names: list[str]) -> None:
        for name in names:
            (self.folder.checkpoints / f"{name}.pt").unlink(missing_ok=True)
            shutil.rmtree(self.folder.checkpoints / name, ignore_errors=True)


def ledger_of(folder: RunFolder, given: Sequence[str] = ()) -> Ledger:
    """The trials of a run; of a new one, with the keys that its user has given."""
    return Ledger(folder.path / SEARCH, write_json, lambda path: read_json(path, dict), given)


def search(job: Job) -> tuple[Student, Facts]:
    """The student that a run's goal finds, and what is to be known of its training.

    The student that its training began with becomes the run's ``calibrated`` one.
    """
    config, quant = job.config, job.config.quant
    ledger = ledger_of(job.folder)
    bench = JobBench(job, ledger.given)
    asked = Widths(quant.weight_bits, quant.act_bits)
    base = replace(
        config.distill,
        **{key: x for key, x in job.search_preset.items() if not ledger.names(f"distill.{key}")},
    )
    schedules = job.schedules(bench.converted(""), base)
    found = Search(bench, config.goal, asked, base, ledger, schedules).find()
    student = bench.kept(found.point.name)
    calibrated = bench.kept(found.calibrated)
    save_student(job.folder, "calibrated", calibrated)
    write_tables(job.folder, calibrated)
    trained = [row for row in ledger.rows if row["kind"] == "trained"]
    facts = {
        "inputs_seen": sum(row["inputs_seen"] for row in trained),
        "unlabelled": max((row["unlabelled"] or 0 for row in trained), default=0),
        "goal": _told(found, job, ledger),
    }
    bench.clear([row["name"] for row in ledger.rows])
    return student, facts


def _told(found: Found, job: Job, ledger: Ledger) -> Facts:
    """What ``metrics.json`` says of a search."""
    goal = job.config.goal
    return {
        "drop": goal.drop,
        "agreement": goal.agreement,
        "kept": found.shortfall <= 0,
        "sure": found.is_sure,
        "shortfall": found.shortfall,
        "validation": found.point.measured.facts(),
        "trials": len(ledger.rows),
        "minutes": round(ledger.minutes, 2),
        "chosen": found.point.name,
        "advice": found.advice,
    }
