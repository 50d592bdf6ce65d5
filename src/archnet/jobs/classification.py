"""One class a sample: images, judged by how many classes are right."""

from __future__ import annotations

from collections.abc import Mapping

from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from archnet.jobs.images import ImageJob
from archnet.jobs.job import Facts
from archnet.runs.look import look
from archnet.tasks import ClassificationData
from archnet.teachers.preprocessing import class_names_of


class Classification(ImageJob):
    """Images (B, C, H, W) to scores of classes (B, K)."""

    data: ClassificationData

    def read(self) -> ClassificationData:
        return ClassificationData(self.config.task, self.config.seed)

    def look(self) -> Facts:
        names = class_names_of(self.config.teacher, self.teacher)
        return look(self.config, self.data, self.captured.scores(), self.device, names)

    def metrics(self, shape: tuple[int, ...]) -> Mapping[str, Metric]:
        return {"accuracy": MulticlassAccuracy(shape[0], average="micro", ignore_index=-1)}
