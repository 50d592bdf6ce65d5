"""Image classification: one class an image."""

from __future__ import annotations

from functools import cached_property

from archnet.errors import TaskError
from archnet.tasks import sources
from archnet.tasks.image_data import ImageData


class ClassificationData(ImageData):
    """Images whose labels are classes, (B,) int64; -1 is an image without one."""

    def _read(self) -> sources.Splits:
        splits = sources.read(self.config.data, self.config.name)
        sources.require_classes(splits, self.config.data.root or self.config.data.source)
        return splits

    @property
    def has_labels(self) -> bool:
        """Whether any image has a label."""
        return any((p.labels != sources.UNLABELLED).any() for p in self._splits.parts.values())

    @cached_property
    def num_classes(self) -> int | None:
        """`task.num_classes`, or what the source says, or the labels that occur.

        None where nothing has a label: what there is, the teacher says.
        """
        splits = self._splits
        if not self.has_labels:
            return self.config.num_classes
        highest = max(int(part.labels.max(initial=0)) for part in splits.parts.values())
        count = self.config.num_classes or len(splits.class_names) or highest + 1
        if highest >= count:
            raise TaskError(
                f"label {highest} occurs in the data, but task.num_classes={count}: raise it"
            )
        return count
