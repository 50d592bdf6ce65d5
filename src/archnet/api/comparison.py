"""`archnet.compare`: teacher and student on the same inputs, and what each costs."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from archnet.distill import captured, require_student
from archnet.distill.training import are_classes
from archnet.errors import ArchnetError
from archnet.hardware import teacher_cost
from archnet.loaders import Batches, LabelledBatch, Loadable, Takes
from archnet.lower import deployed_cost
from archnet.ops import Student, scores
from archnet.ops.scores import Axis, each
from archnet.plugins import first_line
from archnet.report.printed import AsTable, Printed
from archnet.report.table import amount


class CompareError(ArchnetError):
    """Teacher and student cannot be compared so."""


@dataclass(frozen=True, repr=False)
class Comparison(AsTable):
    """Teacher and student on the same inputs.

    Attributes:
        inputs: how many.
        agreement: decisions (the class of each sample, pixel or position) that are the same, in
            points (0 to 100); None where results have no classes.
        error: |student - teacher| / |teacher| of the results; of several, the largest.
        metric: the name of what follows; "" where the data have no labels.
        teacher, student: by that metric; accuracy is in points.
        macs, bops, weight_bytes: of one sample, by "teacher" and "student"; bit operations and
            bytes of the teacher at W8A8. Those of a float student are at 32 bits.
    """

    inputs: int
    agreement: float | None
    error: float
    metric: str
    teacher: float | None
    student: float | None
    macs: dict[str, int]
    bops: dict[str, int]
    weight_bytes: dict[str, int]

    def table(self) -> Printed:
        """The figures, a row each."""
        rows = []
        if self.metric:
            rows.append((self.metric, f"{self.teacher:.4g}", f"{self.student:.4g}"))
        if self.agreement is not None:
            rows.append(("agreement, points", "", f"{self.agreement:.2f}"))
        rows.append(("relative error of the results", "", f"{self.error:.2e}"))
        for name, cost, unit in (
            ("MACs", self.macs, ""),
            ("bit operations (teacher at W8A8)", self.bops, ""),
            ("weights (teacher at W8A8)", self.weight_bytes, "B"),
        ):
            rows.append((name, amount(cost["teacher"], unit), amount(cost["student"], unit)))
        title = f"teacher and student on {self.inputs:,} inputs"
        return Printed(title, ("", "teacher", "student"), rows)


def compare(
    teacher: nn.Module,
    student: Student,
    data: Loadable,
    metric: Metric | None = None,
    *,
    batches: int | None = None,
) -> Comparison:
    """Run teacher and student on the same inputs.

    Args:
        teacher: the network that the student was converted from; it stays as it is.
        student: from `convert`, quantized or not; it runs where it is, in eval mode.
        data: what `archnet.loaders` reads, with labels or without.
        metric: any of torchmetrics', which is given scores and labels as it takes them; each
            network gets a copy. None: accuracy, where labels are classes.
        batches: how many are read; None: all, which have to end.

    Returns:
        Figures that print as a table.

    Raises:
        CompareError: the metric needs labels that are not there, or does not take these.
        DistillError: student or teacher is none, they are swapped, or of another pair.
        TaskError: the data do not fit the network, or have no end.
    """
    require_student(student, teacher)
    takes = Takes.of(student)
    tally = Tally(metric, student.graph.classes)
    scored = captured(teacher, student).scores()
    tally.read(scored, student, Batches(data, takes).limited(batches, "batches"))
    example = tuple(x[:1] for x in takes.example())
    before, after = teacher_cost(teacher, example, 8, 8), deployed_cost(student)
    name, figures = tally.figures()
    return Comparison(
        inputs=tally.inputs,
        agreement=tally.agreement,
        error=max(one.relative_error for one in tally.beside),
        metric=name,
        teacher=figures[0],
        student=figures[1],
        macs={"teacher": before.macs, "student": after.macs},
        bops={"teacher": before.bops, "student": after.bops},
        weight_bytes={"teacher": before.weight_bytes, "student": after.weight_bytes},
    )


class Tally:
    """What is counted batch by batch.

    Args:
        metric: of torchmetrics; None: accuracy, where labels are classes.
        classes: the axis of the classes of each result.

    Attributes:
        inputs, labels: samples, and labels that accuracy knows of.
        alone: right decisions that are the teacher's alone, and the student's alone.
    """

    def __init__(self, metric: Metric | None, classes: Sequence[Axis]) -> None:
        if metric is not None and not isinstance(metric, Metric):
            raise CompareError(
                f"the metric is a {type(metric).__name__}: give one of torchmetrics, such as "
                "torchmetrics.classification.MulticlassF1Score(num_classes=10)"
            )
        self.inputs = self.labels = 0
        self.right, self.alone = [0, 0], [0, 0]
        self.beside = [scores.Comparison(axis) for axis in classes]
        self.metrics = None if metric is None else [copy.deepcopy(metric).cpu() for _ in range(2)]
        for copied in self.metrics or ():
            copied.reset()

    @property
    def agreement(self) -> float | None:
        """Of the decisions of all results, in points."""
        decisions = sum(one.decisions for one in self.beside)
        same = decisions - sum(one.changed for one in self.beside)
        return 100 * same / decisions if decisions else None

    def read(self, teacher: nn.Module, student: Student, batches: Iterable[LabelledBatch]) -> None:
        """Run both where the student is, in eval mode, on all batches."""
        was_training, device = student.training, next(student.parameters()).device
        networks = teacher.to(device), student.eval()
        try:
            with torch.inference_mode():
                for batch in batches:
                    inputs = [x.to(device) for x in batch.inputs]
                    theirs, ours = (
                        [x.float().cpu() for x in each(network(*inputs))] for network in networks
                    )
                    self.add(theirs, ours, batch)
        finally:
            student.train(was_training)

    def add(self, theirs: Sequence[Tensor], ours: Sequence[Tensor], batch: LabelledBatch) -> None:
        """The results of both networks for a batch."""
        self.inputs += len(batch.inputs[0])
        for one, *both in zip(self.beside, theirs, ours, strict=True):
            one.add(*both)
        labels = batch.labels.cpu() if isinstance(batch.labels, Tensor) else batch.labels
        if self.metrics is not None:
            self._update(theirs, ours, labels)
            return
        axes = [index for index, one in enumerate(self.beside) if one.axis is not None]
        if len(axes) != 1:
            return  # labels are of one result with classes
        axis = self.beside[axes[0]].axis
        assert axis is not None
        decided = [scores.decisions(results[axes[0]], axis) for results in (theirs, ours)]
        if are_classes(labels, decided[0]):
            known = labels >= 0
            self.labels += int(known.sum())
            right = [(found == labels) & known for found in decided]
            for index, found in enumerate(right):
                self.right[index] += int(found.sum())
                self.alone[index] += int((found & ~right[1 - index]).sum())

    def _update(self, theirs: Sequence[Tensor], ours: Sequence[Tensor], labels: Any) -> None:
        assert self.metrics is not None
        name = type(self.metrics[0]).__name__
        if labels is None:
            raise CompareError(f"{name} needs labels: give batches (inputs, labels)")
        for metric, results in zip(self.metrics, (theirs, ours), strict=True):
            found: Any = results[0] if len(results) == 1 else tuple(results)
            try:
                metric.update(found, labels)
            except Exception as error:  # a metric raises whatever its checks raise
                shape = tuple(getattr(labels, "shape", ())) or type(labels).__name__
                given = " and ".join(str(tuple(x.shape)) for x in results)
                raise CompareError(
                    f"{name} does not take results {given} and labels {shape}: {first_line(error)}"
                ) from error

    def figures(self) -> tuple[str, tuple[float | None, float | None]]:
        """The name of the metric, and what it says of teacher and student."""
        if self.metrics is None:
            if not self.labels:
                return "", (None, None)
            teacher, student = (100 * right / self.labels for right in self.right)
            return "accuracy, points", (teacher, student)
        name, found = type(self.metrics[0]).__name__, []
        for metric in self.metrics:
            value = metric.compute()
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise CompareError(
                    f"{name} gives no single number: take one that averages over its classes"
                )
            found.append(float(value))
        return name, (found[0], found[1])
