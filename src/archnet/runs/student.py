"""The student of a run, as its folder keeps it."""

import glob
import logging
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from archnet.config import Config
from archnet.ops import Student
from archnet.quant import Quantizer, attach, pack, quantizers, settle, unpack, unquantize
from archnet.runs.folder import RunError, RunFolder, atomic, read_json, write_json
from archnet.tensors import DamagedError, read_tensors

_log = logging.getLogger(__name__)


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


def require_converted(folder: RunFolder) -> None:
    """Raise `RunError` where the converted student cannot be read; mend the tables about it."""
    write_tables(folder, load_student(folder, "calibrated"))


def require_trained(folder: RunFolder) -> None:
    """Raise `RunError` where the trained student cannot be read, settled or not."""
    for name in ("trained", "student"):
        load_student(folder, name)


def write_tables(folder: RunFolder, student: Student) -> None:
    """Write what conversion has done: ``conversion.json``, and ``forms.json`` under a budget.

    What is there already, and right, is left alone.
    """
    tables = {
        "conversion.json": [asdict(row) for row in student.report],
        "forms.json": [asdict(row) for row in student.graph.refinements],
    }
    for name, rows in tables.items():
        path = folder.path / name
        if not rows and not path.exists():
            continue
        if path.exists():
            try:
                if read_json(path, list) == rows:
                    continue
                _log.warning("%s is not what its student says: written again", path)
            except RunError as error:
                _log.warning("%s: written again", error)
        write_json(path, rows)


def load_student(folder: RunFolder, name: str = "student") -> Student:
    """A run's student in eval mode: settled, or as it was ``calibrated`` or ``trained``.

    Raises:
        RunError: the run has not come that far, or the file is damaged.
    """
    path = folder.checkpoints / f"{name}.pt"
    if not path.exists():
        raise RunError(f"{path} is missing: finish the run with resume={folder.path}")
    try:
        packed = read_tensors(path)
    except DamagedError as error:
        raise RunError(f"{error}: resume={folder.path} makes it again") from error
    try:
        _require_sound(packed)
        return unpack(packed)
    # Tensors and plain data of another kind than a student's fail in as many ways as there are.
    except Exception as error:
        line = " ".join(str(error).split())[:200] or type(error).__name__
        raise RunError(
            f"{path} holds no student ({line}): resume={folder.path} makes it again"
        ) from error


def _require_sound(packed: Any) -> None:
    """Raise where a packed student is none, before memory is taken for what it says it is.

    On the meta device modules have sizes and no content.
    """
    with torch.device("meta"):
        ghost = Student.from_spec(packed["architecture"])
        attach(ghost, packed["quantizers"])
    state = packed["state"]
    for name, tensor in ghost.state_dict().items():
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"{name} is {tuple(state[name].shape)} and its operator needs {tuple(tensor.shape)}"
            )
    shapes = dict(ghost.graph.shapes)
    ghost.measure()
    for name, shape in ghost.graph.shapes.items():
        if shapes.get(name) != shape:
            raise ValueError(f"{name} is {shape}, not {shapes.get(name)}")
    for name in (*ghost.graph.outputs, *(tap.value for tap in ghost.taps)):
        if name not in shapes:
            raise ValueError(f"{name} is no value of it")
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name, shape in shapes.items():
        if 4 * math.prod(shape) > room:
            raise ValueError(f"{name} is {shape}: more than this machine's memory")


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
