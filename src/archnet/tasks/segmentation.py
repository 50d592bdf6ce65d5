"""Semantic segmentation: a class for every pixel."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from archnet.errors import TaskError
from archnet.tasks import masks as found_masks
from archnet.tasks import sources
from archnet.tasks.image_data import ImageData
from archnet.tasks.images import FORMATS, Augmentation, Labels, Layout

IGNORED = -1  # the label of a pixel that has no class
# Modes in which a pixel is one number.
_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
_OUTSIDE = 255  # of a mask in memory: no class


class SegmentationData(ImageData):
    """Images whose labels are classes of pixels, (B, H, W) int64; -1 is a pixel without one."""

    def _read(self) -> sources.Splits:
        return found_masks.read(self.config.data, self.config.name)

    @cached_property
    def num_classes(self) -> int | None:
        """`task.num_classes`, or what the source says; None: what the teacher says."""
        return self.config.num_classes or len(self.class_names) or None

    def _labels(self, split: str, items: Tensor, augmentation: Augmentation | None) -> Labels:
        part = self._splits.parts[split]
        if augmentation is not None and augmentation.resized_crop:
            raise TaskError(
                "task.data.augment.resized_crop has no meaning for masks: set it to 0 and take "
                "crop and flip, or a teacher that is trained"
            )
        return Masks(part, items, self._layout, augmentation, self.config.ignored, self.num_classes)


@dataclass(eq=False)
class Masks:
    """Masks of images, decoded when they are asked for.

    Attributes:
        split: the images and their masks.
        items: which of them, by number.
        layout: of the images.
        augmentation: of the images.
        ignored: the number of pixels without a class; None: all have one.
        classes: how many there are; None: not known.
    """

    split: sources.Split
    items: Tensor
    layout: Layout
    augmentation: Augmentation | None
    ignored: int | None
    classes: int | None

    def fetch(self, shown: Sequence[int], keys: Sequence[int]) -> Tensor:
        """(B, H, W) int64.

        Raises:
            TaskError: a mask cannot be decoded, has another size than its image, or a number that
                is no class.
        """
        height, width = self.layout.height, self.layout.width
        found = np.empty((len(shown), height, width), np.uint8)
        for place, item in enumerate(self.items[list(shown)].tolist()):
            found[place] = self._mask(item)
        if self.augmentation is not None:
            # What is cut outside of the image is zero there: here, then, no class.
            turned = torch.from_numpy(_OUTSIDE - found)[..., None]
            seen = self.augmentation.view(turned, np.array(keys, np.uint64))
            found = _OUTSIDE - seen[..., 0].numpy()
        labels = torch.from_numpy(found).long()
        return labels.masked_fill_(labels == _OUTSIDE, IGNORED)

    def _mask(self, item: int) -> NDArray[np.uint8]:
        masks = self.split.masks
        if masks is None or self.split.labels[item] == sources.UNLABELLED:
            return np.full((self.layout.height, self.layout.width), _OUTSIDE, np.uint8)
        if isinstance(masks, np.ndarray):
            return self._classes(masks[item], f"mask {item}")
        name = masks.name(item)
        mask, size = _opened(masks, item), _opened(self.split.images, item).size
        if mask.mode not in _MODES:
            raise TaskError(
                f"{name} is {mask.mode}: a mask holds one number a pixel, its class (8 bits, "
                "palette, or black and white)"
            )
        if mask.size != size:
            raise TaskError(
                f"{name} is {mask.width}x{mask.height} pixels and its image {size[0]}x{size[1]}: "
                "a mask is as large as its image"
            )
        try:
            numbers = np.asarray(mask)
        except Exception as error:  # as `open_image` says of Pillow's readers
            raise TaskError(f"{name} cannot be decoded: mend it or remove it") from error
        return self.layout.mask(self._classes(numbers, name), _OUTSIDE)

    def _classes(self, numbers: NDArray[np.generic], name: str) -> NDArray[np.uint8]:
        """Numbers of a mask as classes, `_OUTSIDE` where there is none."""
        whole = numbers.astype(np.int64)
        without = whole == (-1 if self.ignored is None else self.ignored)
        highest = int(whole[~without].max(initial=0))
        most = min(self.classes or _OUTSIDE, _OUTSIDE) - 1
        if highest > most:
            raise TaskError(
                f"{name} has a pixel of class {highest}, and there are classes 0 to {most}: set "
                f"task.num_classes, or task.ignored={highest} if that is no class"
            )
        return np.where(without, _OUTSIDE, whole).astype(np.uint8)


def _opened(files: sources.Encoded | NDArray[np.uint8], index: int) -> Image.Image:
    """An image whose header is read.

    Raises:
        TaskError: it is none.
    """
    if isinstance(files, np.ndarray):
        return Image.fromarray(files[index].squeeze())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(files.read(index)), formats=FORMATS)
    except Exception as error:  # as `open_image` says of Pillow's readers
        raise TaskError(f"{files.name(index)} cannot be decoded: mend it or remove it") from error
