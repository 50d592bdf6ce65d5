"""A class for every pixel: images, judged by how classes overlap with their masks."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torchmetrics import Metric
from torchmetrics.classification import MulticlassJaccardIndex

from archnet.jobs.evaluation import points
from archnet.jobs.images import ImageJob
from archnet.jobs.job import Facts
from archnet.tasks import SegmentationData
from archnet.tasks.segmentation import IGNORED

_log = logging.getLogger(__name__)

LOOKED_AT = 100  # validation images that a teacher is tried on before it is converted


class Segmentation(ImageJob):
    """Images (B, C, H, W) to scores of classes for every pixel, (B, K, H, W)."""

    data: SegmentationData
    answers = "pixels"

    def read(self) -> SegmentationData:
        return SegmentationData(self.config.task, self.config.seed)

    def look(self) -> Facts:
        """The teacher's mean IoU on a few validation images; a warning where one class everywhere
        would do as well.
        """
        split, loader = self.data.look_loader()
        scores = self.captured.scores().to(self.device)
        judge, lone, count = None, None, 0
        with torch.inference_mode():
            for images, labels in loader:
                if not bool((labels != IGNORED).any()):
                    continue
                result = scores(images.to(self.device)).cpu()
                if judge is None or lone is None:
                    judge, lone = (self.metrics(tuple(result.shape[1:]))["miou"] for _ in range(2))
                often = labels[labels != IGNORED].bincount().argmax()
                judge.update(result, labels)
                lone.update(often.expand_as(labels), labels)
                count += len(images)
                if count >= LOOKED_AT:
                    break
        if judge is None or lone is None:
            _log.info(
                "teacher: its mean IoU is not measured, because the %s images have no masks; the "
                "result will be on how many pixels the student agrees with it", split,
            )  # fmt: skip
            return {"miou": None, "images": 0, "split": split}
        found, chance = points(judge.compute()), points(lone.compute())
        _log.info(
            "teacher: mean IoU %.2f on %d %s images (the most frequent class alone: %.2f)",
            found, count, split, chance,
        )  # fmt: skip
        if found <= 1.2 * chance:
            data = self.config.task.data
            _log.warning(
                "teacher %s: mean IoU %.2f is hardly more than that of one class everywhere: its "
                "training prepared images otherwise (task.data.image_size=%s, mean=%s, std=%s), "
                "its weights are not trained, or its classes are numbered otherwise than the masks",
                self.config.teacher.name, found, data.image_size, data.mean, data.std,
            )  # fmt: skip
        return {"miou": found, "images": count, "split": split}

    def metrics(self, shape: tuple[int, ...]) -> Mapping[str, Metric]:
        return {"miou": MulticlassJaccardIndex(shape[0], ignore_index=IGNORED)}
