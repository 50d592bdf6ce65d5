"""One class a sample: images, judged by how many classes are right."""

from __future__ import annotations

from collections.abc import Mapping

import lightning
from torch import nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from archnet.config import Config, TeacherConfig
from archnet.jobs.job import Facts
from archnet.jobs.tensors import TensorJob
from archnet.runs.device import set_up
from archnet.runs.look import look
from archnet.runs.preprocessing import as_recorded, with_preprocessing
from archnet.runs.teacher import run_teacher
from archnet.tasks import ClassificationData
from archnet.teachers import load_teacher
from archnet.teachers.preprocessing import class_names_of


class Classification(TensorJob):
    """Images (B, C, H, W) to scores of classes (B, K)."""

    unit = "image"
    data: ClassificationData

    @classmethod
    def completed(cls, config: Config) -> Config:
        return with_preprocessing(config)

    @classmethod
    def as_recorded(cls, config: Config, stored: Config) -> Config:
        return as_recorded(config, stored)

    def open(self) -> None:
        set_up(self.config.trainer)
        self.data = ClassificationData(self.config.task, self.config.seed)
        self.data.prepare_data()
        self.data.setup()
        # A teacher without weights is the same one whenever the run is opened again.
        lightning.seed_everything(self.config.seed, verbose=False)
        self.teacher = run_teacher(self.config, self.folder, self.data, self._load)

    def _load(self, source: TeacherConfig) -> nn.Module:
        return load_teacher(
            source,
            num_classes=self.data.num_classes,
            in_channels=self.data.in_channels,
            image_size=self.data.image_size,
        )

    def look(self) -> Facts:
        names = class_names_of(self.config.teacher, self.teacher)
        return look(self.config, self.data, self.captured().scores(), self.device, names)

    def metrics(self, shape: tuple[int, ...]) -> Mapping[str, Metric]:
        return {"accuracy": MulticlassAccuracy(shape[0], average="micro", ignore_index=-1)}

    def data_facts(self) -> Facts:
        return {"skipped": self.data.skipped}
