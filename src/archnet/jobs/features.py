"""Any network of one input tensor, without labels: embeddings, regression, encoders, raw heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torchmetrics import Metric

from archnet.config import Config
from archnet.jobs.custom import Custom
from archnet.jobs.job import Facts
from archnet.jobs.tensors import TensorData
from archnet.runs.preprocessing import as_recorded, stated, with_preprocessing
from archnet.tasks import ClassificationData


class Features(Custom):
    """Inputs (B, ...) to one or several tensors, each judged by how far it is from the teacher's.

    The inputs are images without labels, or come from `task.datamodule`.
    """

    needs_datamodule = False

    @classmethod
    def completed(cls, config: Config) -> Config:
        config = super().completed(config)
        return config if config.task.datamodule else with_preprocessing(config)

    @classmethod
    def as_recorded(cls, config: Config, stored: Config) -> Config:
        return as_recorded(config, stored)

    def preprocessing(self) -> Facts:
        return {} if self.config.task.datamodule else stated(self.config.task.data)

    def read(self) -> TensorData:
        if self.config.task.datamodule:
            return super().read()
        task = replace(self.config.task, data=replace(self.config.task.data, labels="ignore"))
        data = ClassificationData(task, self.config.seed)
        data.prepare_data()
        data.setup()
        return data

    def metrics(self, shape: tuple[int, ...]) -> Mapping[str, Metric]:
        return {}
