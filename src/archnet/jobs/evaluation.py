"""Teacher and student on the same samples: figures, intervals, and where they disagree."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from archnet import intervals
from archnet.errors import ArchnetError
from archnet.jobs.job import Facts
from archnet.ops.scores import Axis, Comparison, changed, decisions
from archnet.plugins import first_line

GROUPS = 20  # of samples, for intervals of figures that are no share of samples
SHOWN = 12  # disagreements that are kept
MOST_CLASSES = 64  # of a confusion matrix

Metrics = Callable[[tuple[int, ...]], Mapping[str, Metric]]


class Evaluation:
    """Batches of results of both networks, judged as they come.

    Args:
        metrics: makes new metrics from the shape of a sample's first result.
        outputs: the names of the results, and where the classes of each lie.
        in_points: metrics are shares, told as points; else they are told as they are.
    """

    def __init__(
        self, metrics: Metrics, outputs: Mapping[str, Axis], in_points: bool = True
    ) -> None:
        self.beside = {name: Comparison(axis) for name, axis in outputs.items()}
        self.count, self.labelled = 0, False
        self._metrics, self._unit = metrics, 100.0 if in_points else 1.0
        # Of several results the first with classes says what a sample is taken for.
        axes = list(outputs.values())
        self._main = next((place for place, axis in enumerate(axes) if axis is not None), None)
        self._axis = None if self._main is None else axes[self._main]
        self._shape: tuple[int, ...] = ()
        self._counted = False  # whether counts of samples say all of the interval
        self._judges: dict[str, Mapping[str, Metric]] = {}
        self._groups: dict[str, list[Mapping[str, Metric]]] = {}
        self._alone = {"teacher": 0, "student": 0}  # samples that only one has right
        self._known = 0  # samples with a label, where a sample is one decision
        self._equal: list[float] = []  # share of equal decisions, sample by sample
        self._confusion: Tensor | None = None
        self._worst: list[tuple[float, int, Facts]] = []
        self._order = itertools.count()

    def add(
        self,
        teacher: Sequence[Tensor],
        student: Sequence[Tensor],
        labels: Any,
        kept: Callable[[int], Facts],
    ) -> None:
        """Results of one batch.

        Args:
            teacher, student: all results (B, ...), on the CPU, of the same shapes.
            labels: classes, -1 where there is none, or whatever the metrics compare results with;
                None: there are none.
            kept: what is worth keeping of the sample at a place in the batch, where the two
                disagree.
        """
        self._shape = tuple(student[0].shape[1:])
        for one, *both in zip(self.beside.values(), teacher, student, strict=True):
            one.add(*both)
        if _says_something(labels):
            self.labelled = True
            for name, results in (("teacher", teacher), ("student", student)):
                self._judge(name, results, labels)
        if self._main is not None:
            self._decide(teacher[self._main], student[self._main], labels, kept)
        self.count += len(student[0])

    def _judge(self, name: str, results: Sequence[Tensor], labels: Any) -> None:
        # Labels of a form of their own are the metric's alone.
        is_tensor = isinstance(labels, Tensor) and len(labels) == len(results[0])
        if name not in self._judges:
            made = self._judges[name] = self._metrics(self._shape)
            self._counted = list(made) == ["accuracy"] and is_tensor and labels.dim() == 1
            groups = GROUPS if is_tensor and not self._counted else 0
            self._groups[name] = [deepcopy(made) for _ in range(groups)]
        _update(self._judges[name], results, labels)
        if not is_tensor:
            return
        group = (torch.arange(len(labels)) + self.count) % GROUPS
        for number, metrics in enumerate(self._groups[name]):
            rows = group == number
            if bool(rows.any()):
                _update(metrics, [result[rows] for result in results], labels[rows])

    def _decide(
        self, teacher: Tensor, student: Tensor, labels: Any, kept: Callable[[int], Facts]
    ) -> None:
        axis = self._axis
        assert axis is not None
        theirs, ours = decisions(teacher, axis), decisions(student, axis)
        differs = changed(teacher, student, axis).reshape(len(teacher), -1)
        shares = differs.double().mean(1)
        self._equal += (1 - shares).tolist()
        alone = theirs.dim() == 1  # one decision a sample
        is_class = isinstance(labels, Tensor) and not labels.is_floating_point()
        labelled = is_class and labels.shape == theirs.shape
        if alone and labelled:
            known = labels >= 0
            right = {"teacher": theirs == labels, "student": ours == labels}
            self._known += int(known.sum())
            for one, other in (("teacher", "student"), ("student", "teacher")):
                self._alone[one] += int((known & right[one] & ~right[other]).sum())
        if teacher.shape[axis] <= MOST_CLASSES:
            rows = labels if self.labelled and labelled else theirs
            self._count(rows.flatten(), ours.flatten(), teacher.shape[axis])
        # Most telling are those of which the teacher is surest, or with most decisions changed.
        weight = shares
        if alone:
            sure = teacher.double().softmax(axis)
            weight = (sure.amax(axis) - sure.gather(axis, ours[:, None])[:, 0]) * shares
        for row in torch.nonzero(shares > 0)[:, 0].tolist():
            entry = float(weight[row]), next(self._order)
            if len(self._worst) == SHOWN and entry[0] <= self._worst[0][0]:
                continue
            facts: Facts = {"index": self.count + row, **kept(row)}
            if alone:
                facts |= {"teacher": int(theirs[row]), "student": int(ours[row])}
                if labelled and int(labels[row]) >= 0:
                    facts["label"] = int(labels[row])
            else:
                facts["changed"] = round(100 * float(shares[row]), 2)
            push = heapq.heappush if len(self._worst) < SHOWN else heapq.heappushpop
            push(self._worst, (*entry, facts))

    def _count(self, rows: Tensor, columns: Tensor, classes: int) -> None:
        known = (rows >= 0) & (rows < classes)
        found = torch.bincount(rows[known] * classes + columns[known], minlength=classes**2)
        found = found.reshape(classes, classes)
        self._confusion = found if self._confusion is None else self._confusion + found

    def facts(self) -> Facts:
        """What `Job.evaluate` returns, and ``details`` for the report."""
        found: dict[str, dict[str, float | None]] = {}
        paired: Facts = {}
        for name in ("teacher", "student"):
            if self.labelled:
                judges = self._judges[name]
                found[name] = {key: self._figure(one.compute()) for key, one in judges.items()}
            else:
                found[name] = dict.fromkeys(self._metrics(self._shape))
        if self.labelled:
            paired = {key: self._paired(key, found) for key in found["teacher"]}
        beside = self.beside.values()
        if numbers := [one for one in beside if one.axis is None]:
            found["student"]["relative_error"] = max(points(one.relative_error) for one in numbers)
            found["student"]["cosine"] = min(round(one.cosine, 6) for one in numbers)
        made = sum(one.decisions for one in beside)
        return {
            **found,
            "agreement": points(1 - sum(one.changed for one in beside) / made) if made else None,
            "agreement_interval": self._agreement(),
            "outputs": self._outputs(),
            "paired": paired,
            "inputs": self.count,
            "details": {
                "disagreements": [row for *_, row in sorted(self._worst, key=lambda e: -e[0])],
                "disagreeing": sum(share < 1 for share in self._equal),
                **self._matrix(),
            },
        }

    def drop(self) -> float | None:
        """How far the student is below the teacher by the first metric; None: without labels.

        Raises:
            ArchnetError: the metric does not say whether more of it is better.
        """
        if not self.labelled or not self._judges["student"]:
            return None
        key = next(iter(self._judges["student"]))
        teacher, student = (self._judges[name][key] for name in ("teacher", "student"))
        if student.higher_is_better is None:
            raise ArchnetError(
                f"metric {key} does not say whether more is better (higher_is_better), so that no "
                "drop of it can be promised: leave goal.drop out, or give goal.agreement"
            )
        below = self._figure(teacher.compute()) - self._figure(student.compute())
        # Not -0.0, which would be told as such.
        return 0.0 + round(below if student.higher_is_better else -below, 6)

    def _outputs(self) -> list[Facts]:
        """How far the student is from the teacher in each result."""
        return [
            {
                "name": name,
                "agreement": None if one.agreement is None else points(one.agreement),
                "relative_error": points(one.relative_error),
                "cosine": round(one.cosine, 6),
            }
            for name, one in self.beside.items()
        ]

    def _figure(self, value: Any) -> float:
        """What a metric gives, of several numbers their mean."""
        return round(self._unit * _mean(value), 4 if self._unit == 100 else 6)

    def _paired(self, key: str, found: Mapping[str, Mapping[str, float | None]]) -> Facts:
        """How far the student is from the teacher by one metric, with its interval."""
        ours, theirs = found["student"][key], found["teacher"][key]
        assert ours is not None
        assert theirs is not None
        facts: Facts = {"difference": round(ours - theirs, 6), "low": None, "high": None}
        bounds: tuple[float, float] | None
        if self._counted:
            alone = self._alone["teacher"], self._alone["student"]
            bounds = intervals.of_pairs(*alone, self._known)
            facts |= {"teacher_alone": alone[0], "student_alone": alone[1]}
            facts["samples"] = self._known
        else:
            bounds, facts["samples"] = self._of_groups(key), self.count
        if bounds is not None and all(map(math.isfinite, bounds)):
            facts["low"], facts["high"] = map(self._figure, bounds)
        return facts

    def _of_groups(self, key: str) -> tuple[float, float] | None:
        """None where there are fewer samples than groups, or a metric's states cannot be merged."""
        if self.count < 2 * GROUPS or not self._groups["student"]:
            return None
        try:
            without = {
                name: [
                    _mean(_merged([by[key] for by in groups[:one] + groups[one + 1 :]]).compute())
                    for one in range(GROUPS)
                ]
                for name, groups in self._groups.items()
            }
            whole = {name: _mean(judges[key].compute()) for name, judges in self._judges.items()}
        except Exception:  # whatever a metric of the user's raises where it is merged
            return None
        differences = [
            ours - theirs
            for ours, theirs in zip(without["student"], without["teacher"], strict=True)
        ]
        return intervals.of_groups(whole["student"] - whole["teacher"], differences)

    def _agreement(self) -> list[float] | None:
        """In points; pixels and tokens of one sample are not independent, samples are."""
        if not self._equal:
            return None
        if all(share in (0, 1) for share in self._equal):
            bounds = intervals.wilson(sum(share == 1 for share in self._equal), len(self._equal))
        else:
            bounds = intervals.of_mean(self._equal)
        low, high = (min(1.0, max(0.0, bound)) for bound in bounds)
        return [points(low), points(high)]

    def _matrix(self) -> Facts:
        if self._confusion is None:
            return {}
        rows = "label" if self.labelled else "teacher"
        return {"confusion": {"rows": rows, "counts": self._confusion.tolist()}}


def _says_something(labels: Any) -> bool:
    """Whether there is a label in a batch: -1 is a sample, or a pixel, without one."""
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return labels is not None
    return bool((labels >= 0).any())


def _mean(value: Any) -> float:
    return float(torch.as_tensor(value).double().mean())


def _update(metrics: Mapping[str, Metric], results: Sequence[Tensor], labels: Any) -> None:
    """Show metrics what a network makes of a batch.

    Raises:
        ArchnetError: a metric takes other results or labels than these.
    """
    given: Any = results[0] if len(results) == 1 else tuple(results)
    for key, metric in metrics.items():
        try:
            metric.update(given, labels)
        except Exception as error:  # whatever a metric of the user's raises
            shapes = " and ".join(str(tuple(result.shape)) for result in results)
            shown = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise ArchnetError(
                f"metric {key} does not take results {shapes} and labels {shown}: "
                f"{first_line(error)}"
            ) from error


def _merged(parts: list[Metric]) -> Metric:
    """One metric of what several have seen."""
    used = [part for part in parts if part.update_called]
    whole = deepcopy(used[0])
    for part in used[1:]:
        whole.merge_state(part)
    return whole


def points(share: Tensor | float) -> float:
    """A share as points, 0 to 100."""
    return round(100 * float(share), 4)
