"""Any data and any metric: a LightningDataModule and a torchmetrics metric of the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import lightning
from torch import nn
from torchmetrics import Metric

from archnet.config import Config, TeacherConfig
from archnet.errors import ConfigError
from archnet.jobs.tensors import TensorData, TensorJob
from archnet.plugins import current_folder, first_line, imported
from archnet.runs.device import set_up
from archnet.runs.teacher import run_teacher
from archnet.tasks.modules import ModuleData
from archnet.teachers import load_network


class Custom(TensorJob):
    """Inputs (B, ...) to whatever the teacher gives."""

    needs_datamodule: ClassVar[bool] = True
    in_points = False

    @classmethod
    def completed(cls, config: Config) -> Config:
        task = config.task
        if task.datamodule is None and cls.needs_datamodule:
            raise ConfigError(
                "task.datamodule is missing: task.datamodule=package.module:MyData names your "
                "LightningDataModule"
            )
        if config.teacher.train:
            raise ConfigError(
                f"teacher.train=true has no meaning for task.kind={task.kind}: train the teacher "
                "yourself, and give teacher.train=false teacher.weights=<file>"
            )
        return config

    def read(self) -> TensorData:
        """The data, set up."""
        return ModuleData(self.config.task, self.config.seed)

    def open(self) -> None:
        set_up(self.config.trainer)
        self.metrics(())  # what cannot be made is said now, not after training
        self.data = self.read()
        lightning.seed_everything(self.config.seed, verbose=False)
        self.teacher = run_teacher(self.config, self.folder, self.data, self._load)

    def _load(self, source: TeacherConfig) -> nn.Module:
        return load_network(source, self.example(), num_classes=self.config.task.num_classes)

    def metrics(self, shape: tuple[int, ...]) -> Mapping[str, Metric]:
        place, arguments = self.config.task.metric, self.config.task.metric_kwargs
        if place is None:
            return {}
        made = imported(place, "task.metric")
        with current_folder():
            try:
                metric = made(**arguments)
            except Exception as error:  # whatever code of others raises
                raise ConfigError(
                    f"task.metric={place} with task.metric_kwargs={arguments} cannot be made: "
                    f"{first_line(error)}"
                ) from error
        if not isinstance(metric, Metric):
            raise ConfigError(
                f"task.metric={place} is a {type(metric).__name__}, not a torchmetrics.Metric"
            )
        return {place.rpartition(":")[2]: metric}
