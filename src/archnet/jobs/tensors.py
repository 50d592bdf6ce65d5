"""Jobs whose networks take one tensor of features a sample: images, and whatever else is one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torchmetrics import Metric

import archnet
from archnet.capture import TeacherGraph, capture
from archnet.config import ConvertConfig, DistillConfig
from archnet.convert import Approximation, native_cycles
from archnet.convert.walk import Classes
from archnet.deploy import to_integers
from archnet.deploy.export import form_named
from archnet.distill import train
from archnet.distill.run import UnlabelledData
from archnet.errors import ArchnetError
from archnet.intervals import standard_error
from archnet.jobs.evaluation import Evaluation
from archnet.jobs.job import Facts, Inputs, Job
from archnet.ops import Student
from archnet.ops.scores import each, unexplained
from archnet.quant import FLOAT
from archnet.search import PRESET

# Of the config's keys, those that a search may double.
MOST_HINGES = {"hinges": 8, "norm_hinges": 8, "gate_hinges": 16}
PARITY_INPUTS = 500  # on which the exported file is compared with the student


class TensorData(UnlabelledData, Protocol):
    """What such a job needs of its data; a `LightningDataModule`, set up.

    A batch is (inputs, labels) of float32 inputs (B, ...) and int64 labels, -1 where there is none.
    """

    def test_dataloader(self) -> Any: ...
    def calibration_batches(self, count: int) -> list[Tensor]: ...
    def calibration_inputs(self, count: int) -> Tensor: ...


class TensorJob(Job):
    """A job of one input tensor. What is left to a subclass: `open`, and `metrics` to judge by.

    Attributes:
        data: there after `open`, as ``teacher``.
    """

    data: TensorData
    search_preset: ClassVar[Mapping[str, Any]] = PRESET
    in_points: ClassVar[bool] = True  # metrics are shares, told as points

    @abstractmethod
    def metrics(self, shape: tuple[int, ...]) -> Mapping[str, Metric]:
        """New metrics by name, which compare a network's results with labels.

        Args:
            shape: of the result for one sample.
        """

    @property
    def classes(self) -> Classes:
        """Where the classes of the results lie, as `archnet.convert` takes it."""
        return "auto" if self.config.task.classes == "auto" else None

    @cached_property
    def captured(self) -> TeacherGraph:
        """The teacher as it is compared with the student: up to its scores."""
        return capture(self.teacher, self.example())

    def convert(self, asked: ConvertConfig) -> tuple[Student, Facts]:
        config = self.config
        student = archnet.convert(
            self.captured,
            self.example(),
            hardware=config.hardware,
            start=asked.start,
            taps=asked.taps,
            inner_taps=asked.inner_taps,
            seed=config.seed,
            classes=self.classes,
            calibration=self.data.calibration_inputs(asked.calibration),
            approximation=Approximation(
                asked.attention,
                asked.attention_hinges,
                asked.hinges,
                asked.norm_hinges,
                asked.gate_hinges,
                asked.min_gain,
                asked.max_macs,
                asked.max_cost,
            ),
        )
        return student, {}

    def conversions(self, student: Student, named: Sequence[str]) -> dict[str, ConvertConfig]:
        """Attention in pairs first, where it is approximated otherwise, then twice the hinges."""
        inexact = {row.rule for row in student.report if not row.exact}
        asked, found = self.config.convert, dict[str, ConvertConfig]()
        is_named = "convert.attention" in named or asked.attention == "pairs"
        if any("attention" in rule for rule in inexact) and not is_named:
            asked = replace(asked, attention="pairs")
            found["convert.attention=pairs"] = asked
        more = {
            key: min(2 * getattr(asked, key), most)
            for key, most in MOST_HINGES.items()
            if f"convert.{key}" not in named
        }
        if inexact and any(more.values()):
            words = [f"convert.{key}={count}" for key, count in more.items()]
            found[" ".join([*found, *words])] = replace(asked, **more)
        return found

    def calibration(self, count: int) -> list[Inputs]:
        return list(self.data.calibration_batches(count))

    def require_computable(self, student: Student) -> None:
        """Float parts are not looked at."""
        quant, target = self.config.quant, self.config.hardware
        widths = (quant.weight_bits, quant.act_bits, quant.first_bits, quant.last_bits)
        if quant.method != "none" and FLOAT not in widths:
            to_integers(student, cast(Any, target.requantization), target.accumulator_bits)

    def distil(
        self,
        student: Student,
        options: DistillConfig,
        folder: Path,
        loggers: Sequence[Logger] = (),
    ) -> Facts:
        # The captured teacher gives its features at the taps, by the nodes that conversion named.
        features = self.captured.features([tap.node for tap in student.taps])
        return train(
            features,
            student,
            self.data,
            options,
            trainer=self.config.trainer,
            folder=folder,
            loggers=loggers,
        )

    def schedules(self, student: Student, options: DistillConfig) -> list[str]:
        return ["joint", "local"] if student.taps else ["joint"]

    def evaluate(self, student: Student) -> Facts:
        """As `Job.evaluate`; of results without classes also how far they are from the teacher's.

        Their largest ``relative_error`` (in per cent) and least ``cosine`` are figures of the
        student; ``outputs`` has those of each.
        """
        found = self._beside(student, self.data.test_dataloader(), self.config.trainer.limit_eval)
        if not found.count:
            raise ArchnetError("the test split is empty: set task.data.test_fraction above zero")
        return found.facts()

    def validate(self, student: Student, count: int, *, drop: bool) -> Facts:
        found = self._beside(student, self.data.val_dataloader(), count)
        if not found.count:
            raise ArchnetError(
                "a goal is measured on validation data, of which there are none: set "
                "task.data.val_fraction above zero"
            )
        facts = found.facts()
        bounds: Facts = next(iter(facts["paired"].values()), {})
        return {
            "agreement": facts["agreement"],
            "agreement_error": _error(*(facts["agreement_interval"] or (None, None))),
            "drop": found.drop() if drop else None,
            "drop_error": _error(bounds.get("low"), bounds.get("high")) if drop else 0.0,
            "inputs": found.count,
        }

    def _beside(self, student: Student, loader: Any, count: int | None) -> Evaluation:
        """Teacher and student on the first ``count`` inputs of a loader; None: on all."""
        networks = {
            "teacher": self.captured.scores().to(self.device),
            "student": student.to(self.device).eval(),
        }
        graph = student.graph
        outputs = dict(zip(graph.output_names, graph.classes, strict=True))
        found = Evaluation(self.metrics, outputs, self.in_points)
        with torch.inference_mode():
            for inputs, labels in _first(loader, count):
                theirs, ours = (
                    [part.cpu() for part in each(network(inputs.to(self.device)))]
                    for network in networks.values()
                )
                found.add(theirs, ours, labels, partial(self._kept, inputs))
        student.cpu()
        return found

    def _kept(self, batch: Tensor, row: int) -> Facts:
        return self.kept(batch[row])

    def kept(self, sample: Tensor) -> Facts:
        """What the report shows of a test sample: nothing, or its ``picture``."""
        return {}

    def tap_errors(self, student: Student) -> dict[str, float]:
        inputs = self.data.calibration_batches(1)[0]
        features = self.captured.features([tap.node for tap in student.taps])
        graph, student = student.graph, student.eval()
        with torch.inference_mode():
            theirs = features(inputs)
            values = [*(tap.value for tap in student.taps), *graph.outputs]
            ours = student.run({graph.inputs[0]: inputs}, values)
        errors = [float(unexplained(*both)) for both in zip(ours, theirs, strict=True)]
        taps = len(student.taps)
        found = {tap.path: error for tap, error in zip(student.taps, errors, strict=False)}
        return {**found, "": max(errors[taps:])}

    def teacher_cycles(self) -> float | None:
        return native_cycles(self.captured, self.example(), self.config.hardware)

    @property
    def files(self) -> list[Path]:
        return [self.folder.onnx]

    def export(self, student: Student) -> list[Path]:
        self.require_computable(student)
        archnet.export(student, self.folder.onnx, form=self.form)
        return self.files

    def write(
        self,
        student: Student,
        output: Path | None,
        form: str,
        opset: int | None,
        length: int | None = None,
    ) -> list[Path]:
        if length is not None:
            raise ArchnetError("length= is for translators: other students have sizes of their own")
        output = output or self.folder.path / f"student_{form}{form_named(form).suffix}"
        return [Path(archnet.export(student, output, form=form, opset=opset))]

    def parity(self, student: Student) -> Facts:
        parity = archnet.parity(student, self.folder.onnx, self.test_inputs(PARITY_INPUTS))
        return {
            "runtime": parity.runtime,
            "max_abs_diff": parity.max_abs_diff,
            "mismatches": parity.mismatches,
        }

    def example(self) -> Tensor:
        return self.data.calibration_batches(1)[0][:1]

    def test_inputs(self, count: int) -> Tensor:
        """The first ``count`` inputs of the test split; fewer if it has fewer."""
        batches, found = [], 0
        for inputs, _ in self.data.test_dataloader():
            batches.append(inputs)
            found += len(inputs)
            if found >= count:
                break
        return torch.cat(batches)[:count]

    def inputs(self, count: int) -> Tensor:
        inputs = self.test_inputs(count)
        if len(inputs) < count:
            size = self.config.task.data.batch_size
            more = self.data.calibration_batches(-(-(count - len(inputs)) // size))
            inputs = torch.cat([inputs, *more])[:count]
        return inputs


def _error(low: float | None, high: float | None) -> float:
    """The standard error of which an interval tells; 0: not known."""
    return 0.0 if low is None or high is None else round(standard_error(low, high), 4)


def _first(loader: Any, count: int | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Batches of a loader up to ``count`` inputs; None: all."""
    for inputs, labels in loader:
        yield inputs[:count], None if labels is None else labels[:count]
        if count is not None and (count := count - len(inputs)) <= 0:
            return
