"""What every job has: the questions that the conductor asks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from archnet import deploy
from archnet.config import Config, ConvertConfig, DistillConfig
from archnet.lower import SampleCost, sample_cost
from archnet.ops import Student
from archnet.runs import RunError, RunFolder
from archnet.runs.device import device_of

Inputs = Tensor | tuple[Tensor, ...]
Facts = dict[str, Any]  # plain data, kept as JSON

# The form in which a float student is deployed, and a quantized one.
FORMS = ("float", "qdq")


class Job(ABC):
    """One purpose, for one run.

    The conductor asks in the order of the methods below. `open` comes before all that computes.
    What a method returns as facts goes into ``stages/`` and from there into ``metrics.json``.

    Attributes:
        config: of the run.
        folder: of the run.
        teacher: in eval mode and frozen; there after `open`.
    """

    unit: ClassVar[str] = "input"  # what is counted, in the singular
    # Keys of `distill` that a search sets where its user has not. Students start near their
    # teacher, and weights that leave zero are rounded back to it.
    search_preset: ClassVar[Mapping[str, Any]] = {"keep_zeros": True}
    # Whether the metric takes much longer to measure than agreement: short trials do without.
    drop_costs: ClassVar[bool] = False
    verified: ClassVar[int] = 2000  # test inputs on which forms are compared

    teacher: nn.Module

    def __init__(self, config: Config, folder: RunFolder) -> None:
        self.config, self.folder = config, folder

    # Before anything computes -----------------------------------------------------------------

    @classmethod
    def completed(cls, config: Config) -> Config:
        """The config with a value for what the data or the teacher's weights state themselves.

        Raises:
            ArchnetError: what is given contradicts that.
        """
        return config

    @classmethod
    def as_recorded(cls, config: Config, stored: Config) -> Config:
        """A config given for a run that exists, with that run's values where `completed` would
        fill it in.
        """
        return config

    @abstractmethod
    def open(self) -> None:
        """Read the data and make, train or find the teacher."""

    # Stages -----------------------------------------------------------------------------------

    def look(self) -> Facts:
        """Measure the teacher on a few inputs that are not of the test split, and say so; warn
        where it seems to be the wrong one.
        """
        return {}

    def preparations(self) -> Mapping[str, Callable[[], Facts]]:
        """Stages of this job alone that come before conversion, by name."""
        return {}

    @abstractmethod
    def convert(self, asked: ConvertConfig) -> tuple[Student, Facts]:
        """The float student of the teacher, and what is to be known of the conversion.

        Args:
            asked: how: as the run's config says, or one of `conversions`.
        """

    def conversions(self, student: Student, named: Sequence[str]) -> dict[str, ConvertConfig]:
        """Closer approximations of the teacher than a student is, for a search to try one after
        another, by what they are called.

        Args:
            student: as the config says, float.
            named: keys that the user has given, which stay.
        """
        return {}

    def preprocessing(self) -> Facts:
        """How a sample becomes the input, for exported files and the report; {}: not stated."""
        return {}

    @abstractmethod
    def calibration(self, count: int) -> list[Inputs]:
        """The first ``count`` unlabelled batches; fewer if there are no more."""

    def require_computable(self, student: Student) -> None:
        """Raise `ArchnetError` where the target's arithmetic cannot hold the student."""
        return

    @abstractmethod
    def distil(
        self,
        student: Student,
        options: DistillConfig,
        folder: Path,
        loggers: Sequence[Logger] = (),
    ) -> Facts:
        """Train the student in place, without labels.

        Args:
            student: quantized or float.
            options: of the training: the run's, or those of a trial of its search.
            folder: for checkpoints, from which it goes on.
            loggers: of losses.

        Returns:
            ``inputs_seen`` and ``unlabelled``, and what `fit` says of time.
        """

    def schedules(self, student: Student, options: DistillConfig) -> list[str]:
        """Those of `distill.schedule` that a search may try, the first at several rates."""
        return [options.schedule]

    def validate(self, student: Student, count: int, *, drop: bool) -> Facts:
        """Teacher and student on the first ``count`` validation inputs, for a search.

        Args:
            student: at any widths.
            count: of inputs.
            drop: whether the task's metric is measured as well.

        Returns:
            ``agreement``, decisions that are the teacher's, in points (None: nothing is decided);
            ``drop``, points of the metric below the teacher (None: no labels);
            ``agreement_error`` and ``drop_error``, their standard errors (0: not known); and
            ``inputs``, how many were compared.

        Raises:
            RunError: the job has no such measure.
        """
        raise RunError(
            f"task.kind={self.config.task.kind} measures no validation data: leave goal.drop and "
            "goal.agreement out"
        )

    @abstractmethod
    def evaluate(self, student: Student) -> Facts:
        """Teacher and student on the same test data.

        Returns:
            ``teacher`` and ``student`` with a figure for each metric (None where the data have no
            labels), their ``agreement`` in points (None where there is nothing to decide), and the
            number of ``inputs``. ``paired`` has, for each metric, the ``difference`` of the
            student from the teacher in points with the bounds of its 95 % interval, ``low`` and
            ``high``, which follow from both having seen the same samples (None: not known), and
            the number of ``samples``; ``agreement_interval`` has the bounds of the agreement's.
            ``details`` are for the report alone.
        """

    def tap_errors(self, student: Student) -> dict[str, float]:
        """How far a student is from the teacher at every tap, by its path, and ``""`` at the end,
        on a batch of unlabelled inputs: shares of unexplained variance.
        """
        return {}

    def teacher_cycles(self) -> float | None:
        """Cycles of the teacher for one sample by the target's costs, were all its operators run
        there; None: not known.
        """
        return None

    def class_names(self) -> tuple[str, ...]:
        """Of the classes, in the order of their numbers; empty: not known."""
        return ()

    def usage(self) -> str:
        """Code that runs the files where they lie, for the report."""
        return f"""\
import numpy as np
import onnxruntime

options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.x64quantprecision", "1")  # sums of products stay whole
session = onnxruntime.InferenceSession("{self.files[0].name}", options)
values = {{
    entry.name: np.zeros([n if isinstance(n, int) else 1 for n in entry.shape], np.float32)
    for entry in session.get_inputs()
}}
for result in session.run(None, values):
    print(result.shape, result.dtype)
"""

    @property
    @abstractmethod
    def files(self) -> list[Path]:
        """Where `export` writes the files that are deployed."""

    @abstractmethod
    def write(
        self,
        student: Student,
        output: Path | None,
        form: str,
        opset: int | None,
        length: int | None = None,
    ) -> list[Path]:
        """Write the student in a form; the paths of what is written.

        Args:
            output: None: a name of its own in the run folder.
            opset: None: as the form needs.
            length: tokens that a translator's TensorFlow Lite encoder reads; None else.
        """

    @abstractmethod
    def export(self, student: Student) -> list[Path]:
        """Write `files`."""

    @abstractmethod
    def parity(self, student: Student) -> Facts:
        """The files in a runtime beside the student in PyTorch.

        Returns:
            ``runtime`` with its version, ``max_abs_diff`` of any output, ``mismatches`` (decisions
            that changed), and what else is worth telling.
        """

    @abstractmethod
    def example(self) -> Inputs:
        """The input of one sample, for which costs are given."""

    def sample_cost(self, student: Student) -> SampleCost:
        """What the student costs for `example`, as its files compute it."""
        return sample_cost(student)

    def data_facts(self) -> Facts:
        """What ``metrics.json`` says of the data: ``skipped`` names what could not be read."""
        return {"skipped": []}

    # For the commands -------------------------------------------------------------------------

    def inputs(self, count: int) -> Tensor:
        """Test inputs, unlabelled ones where these are too few: (count, ...) float32.

        Raises:
            RunError: the student takes something else than one tensor of features.
        """
        raise RunError(
            f"{self.folder.path}: its student has more inputs than one tensor of features, and "
            "this command needs exactly one: evaluate, export, verify, cost and audit take the "
            "run, and compile takes each of its files"
        )

    def verify(
        self, student: Student, count: int | None, forms: Sequence[str] | None
    ) -> list[deploy.Check]:
        """The student in PyTorch and in every form against its golden model.

        Args:
            student: quantized, trained.
            count: test inputs; None: `verified`.
            forms: None: all that run here.
        """
        images = self.inputs(count or self.verified).numpy()
        files = {path.name: path for path in self.files if path.is_file()}
        kind = cast(Any, self.config.hardware.requantization)
        return deploy.verify(student, images, forms, files, kind)

    @property
    def device(self) -> torch.device:
        """Where evaluation runs."""
        return device_of(self.config.trainer)

    @property
    def form(self) -> str:
        """The form in which the run's student is deployed."""
        return FORMS[self.config.quant.method != "none"]
