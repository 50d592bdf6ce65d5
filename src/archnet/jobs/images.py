"""What jobs on images have in common: preprocessing, splits, and a teacher that may be trained."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import lightning
from torch import Tensor, nn

from archnet.config import Config, TeacherConfig
from archnet.jobs.job import Facts
from archnet.jobs.tensors import TensorJob
from archnet.report.picture import png
from archnet.runs.device import set_up
from archnet.runs.preprocessing import as_recorded, stated, with_preprocessing
from archnet.runs.teacher import run_teacher
from archnet.tasks.image_data import ImageData
from archnet.teachers import load_teacher
from archnet.teachers.load import Answers


class ImageJob(TensorJob):
    """A job whose inputs are images (B, C, H, W)."""

    unit = "image"
    answers: ClassVar[Answers] = "classes"  # what the teacher has to give
    data: ImageData

    @classmethod
    def completed(cls, config: Config) -> Config:
        return with_preprocessing(config)

    @classmethod
    def as_recorded(cls, config: Config, stored: Config) -> Config:
        return as_recorded(config, stored)

    @abstractmethod
    def read(self) -> ImageData:
        """The data, not set up yet."""

    def load(self, source: TeacherConfig) -> nn.Module:
        """The teacher that a config names, checked against the data."""
        return load_teacher(
            source,
            num_classes=self.data.num_classes,
            in_channels=self.data.in_channels,
            image_size=self.data.image_size,
            answers=self.answers,
        )

    def open(self) -> None:
        set_up(self.config.trainer)
        self.data = self.read()
        self.data.prepare_data()
        self.data.setup()
        # A teacher without weights is the same one whenever the run is opened again.
        lightning.seed_everything(self.config.seed, verbose=False)
        self.teacher = run_teacher(self.config, self.folder, self.data, self.load)

    def preprocessing(self) -> Facts:
        return stated(self.config.task.data)

    def class_names(self) -> tuple[str, ...]:
        return self.data.class_names

    def usage(self) -> str:
        data, (height, width) = self.config.task.data, self.data.image_size
        names = list(self.class_names()) or None
        return f"""\
import sys

import numpy as np
import onnxruntime
from PIL import Image

CLASSES = {names}
mean, std = np.float32({list(data.mean or ())}), np.float32({list(data.std or ())})
picture = Image.open(sys.argv[1]).convert("{"L" if data.channels == 1 else "RGB"}")
pixels = np.asarray(picture.resize(({width}, {height})), np.float32)
pixels = pixels.reshape({height}, {width}, {data.channels})
images = ((pixels / 255 - mean) / std).transpose(2, 0, 1)[None]

options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.x64quantprecision", "1")  # sums of products stay whole
session = onnxruntime.InferenceSession("{self.files[0].name}", options)
(scores,) = session.run(None, {{session.get_inputs()[0].name: images}})
found = scores.argmax(1)  # the class of the picture, or of each of its pixels
print(found if CLASSES is None or found.size > 1 else CLASSES[int(found.item())])
"""

    def kept(self, sample: Tensor) -> Facts:
        return {"picture": png(self.data.pixels(sample))}

    def data_facts(self) -> Facts:
        return {"skipped": self.data.skipped}
