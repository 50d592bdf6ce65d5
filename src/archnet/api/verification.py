"""`archnet.verify`: a student's file against the integers that it stands for."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from archnet import deploy
from archnet.deploy import Check, ExportError
from archnet.errors import printable
from archnet.loaders import Batches, Loadable, Takes
from archnet.lower import target_of
from archnet.ops import Student
from archnet.quant import describe
from archnet.report.checks import checks_table
from archnet.report.printed import AsTable, Printed

INPUTS = 2000  # that are read, as `archnet verify` does


@dataclass(frozen=True, repr=False)
class Verification(AsTable):
    """What was compared, a `Check` each: PyTorch in two precisions, the file, further forms."""

    name: str
    inputs: int
    checks: tuple[Check, ...]

    @property
    def equal(self) -> bool:
        """Whether every output of all that was run has the same bits."""
        return all(check.bit_equal == 1 for check in self.checks if not check.skipped)

    def table(self) -> Printed:
        """A row for each check."""
        return checks_table(self.name, self.inputs, self.checks)


def verify(
    student: Student,
    file: str | os.PathLike[str],
    data: Loadable,
    *,
    forms: Sequence[str] = (),
    inputs: int = INPUTS,
) -> Verification:
    """Run a student and its ONNX file; compare each with the golden integer model.

    Args:
        student: quantized; it stays as it is.
        file: from `export` of it, of form "qdq" or "subbyte".
        data: what `archnet.loaders` reads; labels are not looked at.
        forms: further ones to export and run, of `archnet.deploy.FORMS`.
        inputs: how many samples are run, at most.

    Returns:
        The checks, which print as a table; a difference is told there and raises nothing.

    Raises:
        ExportError: the file is missing or another student's, the student is none, is not
            quantized, or has several inputs.
        TaskError: the data do not fit the network.
    """
    path = Path(file)
    if not isinstance(student, Student):
        raise ExportError(
            f"a {type(student).__name__} is not a student: call convert() on it first"
        )
    if not describe(student):
        raise ExportError(
            "the student is not quantized, so that it has no integers to verify: quantize() it, or "
            "compare its file with archnet.parity(student, file, inputs)"
        )
    if len(student.graph.inputs) > 1:
        raise ExportError(
            f"the student takes {', '.join(student.graph.inputs)}, and verify runs students of one "
            "input: compare results of its file in your runtime"
        )
    if not path.is_file():
        raise ExportError(f"{printable(path)} is missing: write it with export(student, {path})")
    if path.suffix != ".onnx":
        raise ExportError(
            f"{printable(path)} is no ONNX file: verify an ONNX file of this student, and name "
            f'further forms, forms=["{path.suffix[1:]}"]'
        )
    if inputs < 1:
        raise ExportError(f"inputs={inputs}: at least one is needed")
    found, rows = [], 0
    for batch in Batches(data, Takes.of(student)).labelled():
        found.append(batch.inputs[0].cpu())
        rows += len(found[-1])
        if rows >= inputs:
            break
    images = torch.cat(found)[:inputs].numpy()
    kind: Any = target_of(student).requantization
    checks = deploy.verify(student, images, list(forms), {path.name: path}, cast(Any, kind))
    return Verification(path.name, len(images), tuple(checks))
