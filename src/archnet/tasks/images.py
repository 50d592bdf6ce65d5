"""Encoded or decoded images as batched datasets: decoding, augmentation, normalisation.

A dataset is asked for a whole batch of draws (`__getitems__`) and answers with one tensor, so that
small images held as one uint8 array are cropped, flipped and normalised by a handful of vectorised
operations. The loader's collate function is therefore the identity.
"""

from __future__ import annotations

import io
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from archnet.errors import ArchnetError
from archnet.tasks.sampling import Draw, uniform

_GREY_MODES = ("1", "L", "LA", "I", "I;16", "F")
# Streams of `sampling.uniform`: which random number of a draw is which.
_FLIP, _ROW, _COLUMN, _AREA, _RATIO = range(5)


class TaskError(ArchnetError):
    """Data that cannot be used as they are."""


class DamagedImageError(Exception):
    """A file that is no image, or breaks off; it is skipped and its name reported."""


class Encoded(Protocol):
    """Image files that are read and decoded one at a time."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """The file's bytes."""

    def name(self, index: int) -> str:
        """What a message calls the file."""


@dataclass(frozen=True)
class Layout:
    """The tensor an image becomes: `size` pixels each way, cut from the centre.

    The shorter side is scaled to `resize` pixels before; None leaves the image as large as it is.
    """

    size: int
    resize: int | None
    channels: int

    def whole(self, image: Image.Image) -> NDArray[np.uint8]:
        """The image's centre, uint8 (size, size, channels); black where the image is smaller."""
        width, height = image.size
        if self.resize is not None and min(width, height) != self.resize:
            scale = self.resize / min(width, height)
            shape = max(round(width * scale), 1), max(round(height * scale), 1)
            image = image.resize(shape, Image.Resampling.BILINEAR)
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        return self._array(image.crop((left, top, left + self.size, top + self.size)))

    def part(self, image: Image.Image, box: tuple[int, int, int, int]) -> NDArray[np.uint8]:
        """A (left, top, right, bottom) box of the image, stretched to (size, size, channels)."""
        return self._array(image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box))

    def _array(self, image: Image.Image) -> NDArray[np.uint8]:
        return np.asarray(image, np.uint8).reshape(self.size, self.size, self.channels)


@dataclass(frozen=True)
class Augmentation:
    """Random views, each a function of a draw's key.

    Attributes:
        crop: black pixels added on each side before a crop of the image's size is cut; 0 is off.
        flip: mirror every second image.
        resized_crop: smallest share of the image's area that a crop may keep (Szegedy et al. 2015);
            0 is off.
    """

    crop: int = 0
    flip: bool = False
    resized_crop: float = 0.0

    def view(self, pixels: Tensor, keys: NDArray[np.uint64]) -> Tensor:
        """Flipped and shifted uint8 (B, H, W, C)."""
        batch, height, width, _ = pixels.shape
        row = np.floor(uniform(keys, _ROW) * (2 * self.crop + 1)).astype(np.int64)
        column = np.floor(uniform(keys, _COLUMN) * (2 * self.crop + 1)).astype(np.int64)
        rows = row[:, None] + np.arange(height)
        columns = np.broadcast_to(np.arange(width), (batch, width))
        if self.flip:
            columns = np.where(uniform(keys, _FLIP)[:, None] < 0.5, columns, columns[:, ::-1])
        columns = columns + column[:, None]
        if self.crop:
            pixels = F.pad(pixels, (0, 0, self.crop, self.crop, self.crop, self.crop))
        image = torch.arange(batch)[:, None, None]
        return pixels[
            image, torch.from_numpy(rows)[:, :, None], torch.from_numpy(columns)[:, None, :]
        ]

    def box(self, width: int, height: int, key: NDArray[np.uint64]) -> tuple[int, int, int, int]:
        """A crop of random area and aspect ratio, (left, top, right, bottom); `key` is (1,)."""
        share = self.resized_crop + (1 - self.resized_crop) * uniform(key, _AREA).item()
        ratio = math.exp((2 * uniform(key, _RATIO).item() - 1) * math.log(4 / 3))
        # A box that would stick out is narrowed instead of drawn again: one draw, one key.
        cut_width = min(width, max(1, round(math.sqrt(width * height * share * ratio))))
        cut_height = min(height, max(1, round(math.sqrt(width * height * share / ratio))))
        left = math.floor(uniform(key, _COLUMN).item() * (width - cut_width + 1))
        top = math.floor(uniform(key, _ROW).item() * (height - cut_height + 1))
        return left, top, left + cut_width, top + cut_height


@dataclass(frozen=True)
class Normalisation:
    """(pixel / 255 - mean) / std, channel by channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 (B, H, W, C) to float32 (B, C, H, W), in memory still channels last."""
        std = torch.tensor(self.std)
        offset = -torch.tensor(self.mean) / std
        return pixels.float().mul_(1 / (255 * std)).add_(offset).permute(0, 3, 1, 2)


class ImageSet(Dataset[Tensor]):
    """Images without labels; a batch of draws becomes float32 (B, C, H, W)."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def fetch(self, draws: Sequence[Draw]) -> tuple[Tensor, list[int]]:
        """The normalised images and the index of the item that each shows."""

    def __getitem__(self, draw: Draw | int) -> Tensor:
        """One image, (C, H, W)."""
        return self.__getitems__([draw if isinstance(draw, Draw) else Draw(draw, 0)])[0]

    def __getitems__(self, draws: Sequence[Draw]) -> Tensor:
        """The batch of a list of draws, (B, C, H, W)."""
        return self.fetch(draws)[0]


@dataclass(eq=False)
class MemoryImages(ImageSet):
    """Small images as one uint8 array (N, H, W, C), of which `items` (indices) are shown."""

    pixels: Tensor
    items: Tensor
    normalise: Normalisation
    augmentation: Augmentation | None

    def __len__(self) -> int:
        return len(self.items)

    def fetch(self, draws: Sequence[Draw]) -> tuple[Tensor, list[int]]:
        """Every draw's image: what is damaged was left out of `items` when it was decoded."""
        items = [draw.item for draw in draws]
        pixels = self.pixels[self.items[items]]
        if self.augmentation is not None:
            keys = np.array([draw.key for draw in draws], np.uint64)
            pixels = self.augmentation.view(pixels, keys)
        return self.normalise(pixels), items


@dataclass(eq=False)
class EncodedImages(ImageSet):
    """Images decoded when they are asked for, in the loader's workers.

    A file that cannot be decoded is marked in `damaged`, a byte for each file in memory shared with
    the workers. In training (`replace`) the next readable item takes its place, so that batches
    keep their size; in evaluation the batch is one shorter, since showing another image twice would
    bend the metric.
    """

    files: Encoded
    items: Tensor
    layout: Layout
    normalise: Normalisation
    augmentation: Augmentation | None
    damaged: Tensor
    replace: bool

    def __len__(self) -> int:
        return len(self.items)

    def fetch(self, draws: Sequence[Draw]) -> tuple[Tensor, list[int]]:
        """The draws' images, or those that replace them.

        Raises:
            TaskError: no image at all can be decoded.
        """
        shown: list[int] = []
        views: list[NDArray[np.uint8]] = []
        for draw in draws:
            for step in range(len(self) if self.replace else 1):
                item = (draw.item + step) % len(self)
                view = self._view(item, draw.key)
                if view is not None:
                    shown.append(item)
                    views.append(view)
                    break
        if self.replace and not views:
            raise TaskError(
                f"none of {len(self)} images can be decoded, {self.files.name(0)} first"
            )
        shape = (len(views), self.layout.size, self.layout.size, self.layout.channels)
        pixels = np.stack(views) if views else np.empty(shape, np.uint8)
        return self.normalise(torch.from_numpy(pixels)), shown

    def _view(self, item: int, key: int) -> NDArray[np.uint8] | None:
        """One image as uint8 (size, size, channels), or None where its file is damaged."""
        file = int(self.items[item])
        if self.damaged[file]:
            return None
        try:
            image = open_image(self.files, file, self.layout.channels)
        except DamagedImageError:
            self.damaged[file] = 1
            return None
        random, keys = self.augmentation, np.array([key], np.uint64)
        if random is None:
            return self.layout.whole(image)
        if random.resized_crop:
            view = self.layout.part(image, random.box(*image.size, keys))
            return view[:, ::-1] if random.flip and uniform(keys, _FLIP).item() >= 0.5 else view
        return random.view(torch.tensor(self.layout.whole(image))[None], keys)[0].numpy()


@dataclass(eq=False)
class LabelledImages(Dataset[tuple[Tensor, Tensor]]):
    """Images (B, C, H, W) with labels (B,), for training a teacher and for evaluation only."""

    images: ImageSet
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: Draw | int) -> tuple[Tensor, Tensor]:
        """One image (C, H, W) and its label ()."""
        images, labels = self.__getitems__([draw if isinstance(draw, Draw) else Draw(draw, 0)])
        return images[0], labels[0]

    def __getitems__(self, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
        """The batch of a list of draws; a replaced image brings its own label."""
        images, shown = self.images.fetch(draws)
        return images, self.labels[shown]


def open_image(files: Encoded, index: int, channels: int) -> Image.Image:
    """The decoded image with `channels` channels (1 or 3).

    Grey, palette, CMYK and transparent images become RGB where three channels are wanted.

    Raises:
        TaskError: a colour image where one channel is wanted: grey can be made of it in several
            ways, and which one the teacher was trained on is not ours to guess.
        DamagedImageError: the file cannot be decoded.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(files.read(index)))
        image.load()
    # Pillow's readers raise whatever a damaged header makes them stumble over.
    except Exception as error:
        raise DamagedImageError(files.name(index)) from error
    if channels == 1 and image.mode not in _GREY_MODES:
        raise TaskError(
            f"{files.name(index)} is {image.mode}, but task.data.channels=1: "
            "set task.data.channels=3, or convert the images to grey"
        )
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("L" if channels == 1 else "RGB")


def decode_all(files: Encoded, layout: Layout) -> tuple[Tensor, Tensor]:
    """All images as uint8 (N, size, size, channels), and flags (N,): 1 is damaged, left black."""
    pixels = np.zeros((len(files), layout.size, layout.size, layout.channels), np.uint8)
    damaged = torch.zeros(len(files), dtype=torch.uint8)
    for index in range(len(files)):
        try:
            pixels[index] = layout.whole(open_image(files, index, layout.channels))
        except DamagedImageError:
            damaged[index] = 1
    return torch.from_numpy(pixels), damaged
