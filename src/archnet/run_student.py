"""The student of a run, as its folder keeps it."""

import glob
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from archnet.config import Config
from archnet.ops import Student
from archnet.quant import Quantizer, pack, quantizers, settle, unpack, unquantize
from archnet.runs import RunError, RunFolder, atomic


def save_student(folder: RunFolder, name: str, student: Student) -> None:
    """Keep a student in a run's folder, atomically."""
    with atomic(folder.checkpoints / f"{name}.pt") as temporary:
        torch.save(pack(student), temporary)


def settle_student(folder: RunFolder, student: Student) -> dict[str, Any]:
    """Settle a trained student and keep it, as it was ``trained`` as well; the margins by step."""
    save_student(folder, "trained", student)
    margins = settle(student)
    save_student(folder, "student", student)
    return {"margins": {margin.step: margin.roundings for margin in margins}}


def load_student(folder: RunFolder, name: str = "student") -> Student:
    """A run's student in eval mode: settled, or as it was ``calibrated`` or ``trained``.

    Raises:
        RunError: the run has not come that far.
    """
    path = folder.checkpoints / f"{name}.pt"
    if not path.is_file():
        raise RunError(f"{path} is missing: finish the run with resume={folder.path}")
    return unpack(torch.load(path, weights_only=True))


def given_student(config: Config) -> tuple[Student, dict[str, Quantizer]]:
    """The student of the finished run that `convert.student` names, by its folder or by a pattern:
    then the newest one. Of a quantized run the weights as they were trained, before rounding.

    Returns:
        The student, float, and the quantizers it was trained with, for `quantize`.

    Raises:
        RunError: there is no such run, it is not finished, or it was made from another teacher or
            for another target than this run's.
    """
    name = str(config.convert.student)
    given = f"convert.student={name}"
    if glob.has_magic(name):
        # Folders begin with the time of their runs.
        finished = sorted(
            path for path in glob.glob(name) if RunFolder(Path(path)).metrics.is_file()
        )
        if not finished:
            raise RunError(f"{given} matches no finished run: run that experiment first")
        name = finished[-1]
    folder = RunFolder.open(name)
    student = load_student(folder)
    learned = quantizers(student)
    if learned:
        student = load_student(folder, "trained")
        learned = quantizers(student)
        unquantize(student)
    earlier = folder.config()
    for key, mine, theirs in (
        ("task", config.task.name, earlier.task.name),
        ("teacher", asdict(config.teacher), asdict(earlier.teacher)),
        ("hardware", config.hardware.name, earlier.hardware.name),
    ):
        if mine != theirs:
            raise RunError(
                f"{given} is a run of another {key}: name a run of this {key}, or leave "
                "convert.student out"
            )
    return student, learned
