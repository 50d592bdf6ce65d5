"""Encoded or decoded images as batched datasets: decoding, augmentation, normalisation.

A dataset is asked for a whole batch of draws (`__getitems__`) and answers with one tensor, so that
small images held as one uint8 array are cropped, flipped and normalised by a handful of vectorised
operations. The loader's collate function is therefore the identity.
"""

from __future__ import annotations

import io
import math
import warnings
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

from archnet.errors import TaskError
from archnet.tasks.sampling import Draw, uniform
from archnet.tasks.sources import Encoded

_GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F")
# What Pillow may take a file for: the kinds whose suffixes `sources` lists, and nothing that runs
# other programs (PostScript) or has rarely been tried.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Of an image, decoded or scaled: what Pillow takes for an attack.
_MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)
# Streams of `sampling.uniform`: which random number of a draw is which.
_FLIP, _ROW, _COLUMN, _AREA, _RATIO = range(5)


class DamagedImageError(Exception):
    """A file that is no image, or breaks off; it is skipped and its name reported."""


@dataclass(frozen=True)
class Layout:
    """The array an image becomes: uint8 (height, width, channels), cut from its centre.

    Sizes and places are those of torchvision's `Resize` and `CenterCrop`, to the pixel.

    Attributes:
        height: of the array, pixels.
        width: of the array, pixels.
        channels: 1 or 3.
        resize: what the image is scaled to before: its shorter side, (height, width), 0: not at
            all; None: until it just covers the array.
        interpolation: nearest, bilinear, bicubic or lanczos.
    """

    height: int
    width: int
    channels: int
    resize: int | tuple[int, int] | None = None
    interpolation: str = "bilinear"

    def whole(self, image: Image.Image) -> NDArray[np.uint8]:
        """The image's centre; black where the image is smaller.

        Raises:
            DamagedImageError: the image is so thin that scaling its shorter side makes it huge.
        """
        size = self._scaled(*image.size)
        if size[0] * size[1] > _MOST_PIXELS:
            raise DamagedImageError(f"{image.width}x{image.height} pixels")
        if size != image.size:
            image = image.resize(size, self._filter)
        left, top = _start(image.width, self.width), _start(image.height, self.height)
        return self._array(image.crop((left, top, left + self.width, top + self.height)))

    def mask(self, numbers: NDArray[np.uint8], outside: int) -> NDArray[np.uint8]:
        """What `whole` shows of an image, of the numbers (H, W) of its pixels; nothing is mixed.

        Args:
            numbers: as many as the image has pixels.
            outside: the number of pixels beside the image.
        """
        # Cutting adds zeros.
        image = Image.fromarray(outside - numbers)
        size = self._scaled(*image.size)
        if size != image.size:
            image = image.resize(size, Image.Resampling.NEAREST)
        left, top = _start(image.width, self.width), _start(image.height, self.height)
        cut = image.crop((left, top, left + self.width, top + self.height))
        return outside - np.asarray(cut, np.uint8)

    def part(self, image: Image.Image, box: tuple[int, int, int, int]) -> NDArray[np.uint8]:
        """A (left, top, right, bottom) box of the image, stretched to the array."""
        return self._array(image.resize((self.width, self.height), self._filter, box=box))

    def aspect(self, width: int, height: int) -> float:
        """Width over height of the part of an image of that size that `whole` shows."""
        if isinstance(self.resize, tuple):
            return width / height
        return self.width / self.height

    def _scaled(self, width: int, height: int) -> tuple[int, int]:
        if isinstance(self.resize, tuple):
            return self.resize[1], self.resize[0]
        if self.resize == 0:
            return width, height
        if self.resize is None:
            # Which side decides: the one that is shorter in proportion to the array's.
            if width * self.height <= height * self.width:
                return self.width, self.width * height // width
            return self.height * width // height, self.height
        if width <= height:
            return self.resize, self.resize * height // width
        return self.resize * width // height, self.resize

    @property
    def _filter(self) -> Image.Resampling:
        return Image.Resampling[self.interpolation.upper()]

    def _array(self, image: Image.Image) -> NDArray[np.uint8]:
        return np.asarray(image, np.uint8).reshape(self.height, self.width, self.channels)


def _start(whole: int, part: int) -> int:
    """Where the centre ``part`` of ``whole`` pixels begins; negative where it is larger."""
    return -((part - whole) // 2) if part > whole else round((whole - part) / 2)


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

    def box(
        self, width: int, height: int, key: NDArray[np.uint64], aspect: float = 1.0
    ) -> tuple[int, int, int, int]:
        """A crop of random area and of a ratio near `aspect` (width over height).

        Returns (left, top, right, bottom); `key` is (1,).
        """
        share = self.resized_crop + (1 - self.resized_crop) * uniform(key, _AREA).item()
        ratio = aspect * math.exp((2 * uniform(key, _RATIO).item() - 1) * math.log(4 / 3))
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

    def undone(self, image: Tensor) -> NDArray[np.uint8]:
        """One image, float32 (C, H, W) to uint8 (H, W, C)."""
        shares = image.cpu().permute(1, 2, 0) * torch.tensor(self.std) + torch.tensor(self.mean)
        return (255 * shares).round().clamp(0, 255).to(torch.uint8).numpy()


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
        shape = (len(views), self.layout.height, self.layout.width, self.layout.channels)
        pixels = np.stack(views) if views else np.empty(shape, np.uint8)
        return self.normalise(torch.from_numpy(pixels)), shown

    def _view(self, item: int, key: int) -> NDArray[np.uint8] | None:
        """One image as uint8 (height, width, channels), or None where its file is damaged."""
        file = int(self.items[item])
        if self.damaged[file]:
            return None
        random, keys = self.augmentation, np.array([key], np.uint64)
        try:
            image = open_image(self.files, file, self.layout.channels)
            if random is not None and random.resized_crop:
                box = random.box(*image.size, keys, self.layout.aspect(*image.size))
                view = self.layout.part(image, box)
                return view[:, ::-1] if random.flip and uniform(keys, _FLIP).item() >= 0.5 else view
            pixels = self.layout.whole(image)
        except DamagedImageError:
            self.damaged[file] = 1
            return None
        return (
            pixels if random is None else random.view(torch.tensor(pixels)[None], keys)[0].numpy()
        )


class Labels(Protocol):
    """What images are labelled with."""

    def fetch(self, shown: Sequence[int], keys: Sequence[int]) -> Tensor:
        """int64 labels of the items ``shown``; those that lie in the picture are seen as ``keys``
        of an augmentation have turned it.
        """


@dataclass(eq=False)
class ClassLabels:
    """One class an image, (N,) int64; -1: none."""

    classes: Tensor

    def fetch(self, shown: Sequence[int], keys: Sequence[int]) -> Tensor:
        """(B,)."""
        return self.classes[list(shown)]


@dataclass(eq=False)
class LabelledImages(Dataset[tuple[Tensor, Tensor]]):
    """Images (B, C, H, W) with labels (B, ...), for training a teacher and for evaluation only."""

    images: ImageSet
    labels: Labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: Draw | int) -> tuple[Tensor, Tensor]:
        """One image (C, H, W) and its label."""
        images, labels = self.__getitems__([draw if isinstance(draw, Draw) else Draw(draw, 0)])
        return images[0], labels[0]

    def __getitems__(self, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
        """The batch of a list of draws; a replaced image brings its own label."""
        images, shown = self.images.fetch(draws)
        # Only evaluation, which turns nothing, leaves images out.
        return images, self.labels.fetch(shown, [draw.key for draw in draws[: len(shown)]])


def open_image(files: Encoded, index: int, channels: int) -> Image.Image:
    """The decoded image with `channels` channels (1 or 3).

    Grey, palette, CMYK and transparent images become RGB where three channels are wanted; of 16
    bits a pixel the upper 8 are kept.

    Raises:
        TaskError: a colour image where one channel is wanted: grey can be made of it in several
            ways, and which one the teacher was trained on is not ours to guess; or pixels of 32
            bits, whose range a file does not state.
        DamagedImageError: the file cannot be decoded, is no image of the kinds that are read, or
            has more pixels than Pillow takes for an attack (179 million).
    """
    try:
        with warnings.catch_warnings():
            # Half of what is refused is a warning of Pillow's.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(files.read(index)), formats=FORMATS)
            image.load()
    # Pillow's readers raise whatever a damaged header makes them stumble over.
    except Exception as error:
        raise DamagedImageError(files.name(index)) from error
    if channels == 1 and image.mode not in _GREY_MODES:
        raise TaskError(
            f"{files.name(index)} is {image.mode}, but task.data.channels=1: "
            "set task.data.channels=3, or convert the images to grey"
        )
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise TaskError(
            f"{files.name(index)} has pixels of 32 bits, and no file says what is white there: "
            "convert the images to 8 or 16 bits"
        )
    try:
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return image.convert("L" if channels == 1 else "RGB")
    except ValueError as error:  # a mode that Pillow decodes and does not convert
        raise DamagedImageError(files.name(index)) from error


def decode_all(files: Encoded, layout: Layout) -> tuple[Tensor, Tensor]:
    """All images as uint8 (N, H, W, channels), and flags (N,): 1 is damaged, left black."""
    pixels = np.zeros((len(files), layout.height, layout.width, layout.channels), np.uint8)
    damaged = torch.zeros(len(files), dtype=torch.uint8)
    for index in range(len(files)):
        try:
            pixels[index] = layout.whole(open_image(files, index, layout.channels))
        except DamagedImageError:
            damaged[index] = 1
    return torch.from_numpy(pixels), damaged


def common_size(images: Encoded | NDArray[np.uint8], sample: int = 32) -> tuple[int, int] | None:
    """Height and width that a sample of the images all have; None where they differ.

    Only headers are decoded; what cannot be read is passed over.
    """
    if isinstance(images, np.ndarray):
        return images.shape[1], images.shape[2]
    found = set()
    for index in {len(images) * place // sample for place in range(sample)}:
        try:
            with Image.open(io.BytesIO(images.read(index)), formats=FORMATS) as image:
                found.add((image.height, image.width))
        except Exception:  # as in `open_image`
            continue
    return found.pop() if len(found) == 1 else None
