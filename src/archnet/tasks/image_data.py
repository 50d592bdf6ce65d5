"""Images with labels of any kind: splits, loaders, and the wall between images and labels."""

from __future__ import annotations

import logging
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from lightning import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from archnet.config import sides
from archnet.errors import TaskError
from archnet.tasks import sources
from archnet.tasks.images import (
    Augmentation,
    ClassLabels,
    EncodedImages,
    ImageSet,
    LabelledImages,
    Labels,
    Layout,
    MemoryImages,
    Normalisation,
    decode_all,
)
from archnet.tasks.sampling import Draw, SequentialBatchSampler, StepBatchSampler, permutation

_log = logging.getLogger(__name__)

# Images up to so many pixels are decoded once: 50,000 of 32x32 take 150 MB, and workers would cost
# more than they save.
_MEMORY_PIXELS = 64 * 64
# The test split cut from data that have none must not move with the run's seed.
_TEST_SEED = 0


class AugmentOptions(Protocol):
    crop: int
    flip: bool
    resized_crop: float


class DataOptions(Protocol):
    """What is read of `task.data`; `archnet.config.DataConfig` says what each key means."""

    root: str | None
    source: str
    labels: str
    download: bool
    val_fraction: float
    test_fraction: float
    unlabelled: int | None
    batch_size: int
    eval_batch_size: int
    workers: int
    image_size: int | str | None
    resize: int | str | None
    interpolation: str | None
    channels: int
    mean: list[float] | None
    std: list[float] | None

    @property
    def augment(self) -> AugmentOptions: ...


class TaskOptions(Protocol):
    """What is read of `task`."""

    name: str
    num_classes: int | None
    ignored: int | None

    @property
    def data(self) -> DataOptions: ...


@dataclass(frozen=True)
class _Store:
    """One split, ready to be drawn from: pixels in memory, or files to decode.

    `damaged` (N,) flags the files that could not be decoded.
    """

    images: Tensor | sources.Encoded
    damaged: Tensor


class ImageData(LightningDataModule):
    """Images for distillation, and apart from them labelled ones to evaluate and teach teachers.

    A subclass says where they come from (`_read`) and what a label is (`_labels`): here, one class
    an image.

    Which split is which:

    - val is the source's own if it has train, val and test; otherwise it is cut from train by the
      seed.
    - test is the source's own; if it has none, its val takes the place (ImageNet's custom); if it
      has neither, `test_fraction` is cut from train, the same for every seed; where that is 0, the
      whole set is evaluated.

    Images without a label train. They are not in val and test, unless nothing there has a label:
    then val and test have labels of -1, and what can be measured is agreement.

    A split is decoded when it is first asked for, so that nothing looks at test before evaluation.

    Args:
        config: the task's options, with sizes and statistics of images given.
        seed: of the validation cut, of the choice of unlabelled images and of the order of
            training.

    Raises:
        TaskError: options that contradict each other; from `setup`, data that are missing or
            unusable.
    """

    def __init__(self, config: TaskOptions, seed: int) -> None:
        super().__init__()
        data = config.data
        if data.channels not in (1, 3):
            raise TaskError(f"task.data.channels={data.channels}: images have 1 or 3 channels")
        if data.image_size is None or data.mean is None or data.std is None:
            raise TaskError(
                "task.data.image_size, task.data.mean and task.data.std are not set: give those "
                "that the teacher was trained with"
            )
        if not len(data.mean) == len(data.std) == data.channels:
            raise TaskError(
                f"task.data.mean has {len(data.mean)} and task.data.std {len(data.std)} values, "
                f"but task.data.channels={data.channels}: give one value a channel"
            )
        self.config, self.seed = config, seed
        self.in_channels = data.channels
        self.image_size = sides("task.data.image_size", data.image_size)
        self._normalise = Normalisation(tuple(data.mean), tuple(data.std))
        self._layout = Layout(
            *self.image_size, data.channels, _resize(data.resize), data.interpolation or "bilinear"
        )
        self._augmentation = Augmentation(
            data.augment.crop, data.augment.flip, data.augment.resized_crop
        )
        self._stores: dict[str, _Store] = {}

    # Splits ---------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Download what is missing, in one process."""
        if self.config.data.source == "cifar10":
            _ = self._splits

    def setup(self, stage: str | None = None) -> None:
        """Read labels and names, not yet the images; the checks that need no decoding."""
        _ = self._splits

    @cached_property
    def _splits(self) -> sources.Splits:
        splits = self._read()
        for note in splits.notes:
            _log.warning(note)
        return splits

    @property
    @abstractmethod
    def num_classes(self) -> int | None:
        """How many classes the labels have; None: what the teacher says."""

    @abstractmethod
    def _read(self) -> sources.Splits:
        """The source's splits, checked as far as that needs no decoding."""

    def _labels(self, split: str, items: Tensor, augmentation: Augmentation | None) -> Labels:
        """The labels of some of a split's images, in their order."""
        return ClassLabels(torch.from_numpy(self._splits.parts[split].labels)[items])

    def pixels(self, image: Tensor) -> NDArray[np.uint8]:
        """An image (C, H, W) as networks read it, as it was before: (H, W, C) of 0 to 255."""
        return self._normalise.undone(image)

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of their numbers; empty where the source does not tell them."""
        return self._splits.class_names

    @cached_property
    def _items(self) -> dict[str, tuple[str, NDArray[np.int64]]]:
        """For train, val and test: the source's split, and which of its images."""
        data, parts = self.config.data, self._splits.parts
        own = {name: (name, np.arange(len(part), dtype=np.int64)) for name, part in parts.items()}
        items = dict(own)
        if "test" not in own and "val" in own:
            items["test"] = items.pop("val")
        train = own["train"][1] if "train" in own else np.empty(0, np.int64)
        if "test" not in items:
            order = permutation(len(train), _TEST_SEED, 0)
            count = _share(data.test_fraction, len(train))
            items["test"] = ("train", np.sort(order[:count]) if count else train)
            train = np.sort(order[count:])
            if not count:
                _log.warning(
                    "no test split and task.data.test_fraction=0: the whole set is evaluated, "
                    "training images included"
                )
        order = train[permutation(len(train), self.seed, 0)] if len(train) else train
        if "val" not in items:
            count = _share(data.val_fraction, len(train))
            items["val"], order = ("train", np.sort(order[:count])), order[count:]
        items["train"] = ("train", order)
        # Class folders are read class by class; the first images of a split are to be a sample
        # of all of it, since validation while training and parity look at the first few.
        for name in ("val", "test"):
            split, chosen = items[name]
            mixed = chosen[permutation(len(chosen), _TEST_SEED, 0)] if len(chosen) else chosen
            labels = parts[split].labels[mixed] if len(mixed) else mixed
            known = labels != sources.UNLABELLED
            items[name] = (split, mixed[known] if known.any() else mixed)
        return items

    def _store(self, split: str) -> _Store:
        """The images of one of the source's splits, decoded at the first call if they are small."""
        if split not in self._stores:
            part = self._splits.parts[split]
            if isinstance(part.images, np.ndarray):
                self._check_pixels(part.images)
                self._stores[split] = _Store(
                    torch.from_numpy(part.images), torch.zeros(len(part), dtype=torch.uint8)
                )
            elif self._in_memory:
                self._stores[split] = self._decode(part.images)
            else:
                flags = torch.zeros(len(part), dtype=torch.uint8).share_memory_()
                self._stores[split] = _Store(part.images, flags)
        return self._stores[split]

    @property
    def _in_memory(self) -> bool:
        height, width = self.image_size
        return height * width <= _MEMORY_PIXELS and not self._augmentation.resized_crop

    def _check_pixels(self, pixels: NDArray[np.uint8]) -> None:
        expected = (*self.image_size, self.in_channels)
        if pixels.shape[1:] != expected:
            raise TaskError(
                f"{self.config.data.source} has images of {pixels.shape[1:]} (H, W, C), "
                f"but task.data.image_size={expected[0]}x{expected[1]} and "
                f"task.data.channels={expected[2]}: "
                "set these to match"
            )

    def _decode(self, files: sources.Encoded) -> _Store:
        """Small images as pixels.

        A damaged file keeps its black place, flagged, so that indices stay the source's.
        """
        pixels, damaged = decode_all(files, self._layout)
        if damaged.all():
            raise TaskError(
                f"none of {len(files)} images can be decoded, {files.name(0)} among them"
            )
        names = [files.name(int(index)) for index in damaged.nonzero().flatten()]
        if names:
            _log.warning("%d damaged images skipped: %s", len(names), ", ".join(names[:5]))
        return _Store(pixels, damaged)

    @property
    def skipped(self) -> list[str]:
        """Names of the damaged files met so far; they are left out wherever images are drawn."""
        return [
            images.name(int(index))
            for split, store in self._stores.items()
            if not isinstance(images := self._splits.parts[split].images, np.ndarray)
            for index in store.damaged.nonzero().flatten()
        ]

    def _images(
        self, name: str, augmented: bool, count: int | None = None, labelled: bool = False
    ) -> tuple[ImageSet, Labels]:
        """Images of train, val or test, and their labels, one for each item."""
        split, chosen = self._items[name]
        if labelled and len(chosen):
            chosen = chosen[self._splits.parts[split].labels[chosen] != sources.UNLABELLED]
            if not len(chosen):
                raise TaskError(
                    "teacher.train=true needs labels, and the training images have none"
                )
        if not len(chosen):
            raise TaskError(
                f"{self.config.data.root or self.config.data.source} leaves no images for {name}: "
                "give it a train split, or set task.data.val_fraction and task.data.test_fraction "
                "to suit its size"
            )
        store = self._store(split)
        items = torch.from_numpy(chosen)[:count]
        augmentation = self._augmentation if augmented else None
        if isinstance(store.images, Tensor):
            items = items[store.damaged[items] == 0]
            images: ImageSet = MemoryImages(store.images, items, self._normalise, augmentation)
        else:
            images = EncodedImages(
                files=store.images,
                items=items,
                layout=self._layout,
                normalise=self._normalise,
                augmentation=augmentation,
                damaged=store.damaged,
                replace=name == "train",
            )
        return images, self._labels(split, items, augmentation)

    # Datasets -------------------------------------------------------------------------------

    def unlabelled(self) -> ImageSet:
        """What distillation sees: `task.data.unlabelled` images of train (None: all), and no label.

        No label is reachable from it. (Large images in class folders are read by path, and a path
        names its folder.)
        """
        return self._images("train", augmented=True, count=self.config.data.unlabelled)[0]

    def labelled(self) -> LabelledImages:
        """The training part with its labels, for training a teacher and nothing else."""
        return LabelledImages(*self._images("train", augmented=True, labelled=True))

    # Loaders --------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Unlabelled images float32 (B, C, H, W), from the trainer's present step to its last.

        Without a trainer, one pass over the images.
        """
        dataset = self.unlabelled()
        data = self.config.data
        steps = -(-len(dataset) // data.batch_size)
        start = 0
        if self.trainer is not None:
            steps = self.trainer.max_steps if self.trainer.max_steps > 0 else steps
            start = self.trainer.global_step
        rank, world = self._place
        return self.step_loader(
            dataset, data.batch_size, steps, start=start, rank=rank, world=world
        )

    def step_loader(
        self,
        dataset: ImageSet | LabelledImages,
        batch_size: int,
        steps: int,
        *,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> DataLoader[Any]:
        """Batches `start` to `steps` - 1 of a dataset above, as `StepBatchSampler` says."""
        sampler = StepBatchSampler(
            len(dataset), batch_size, steps, self.seed, start=start, rank=rank, world=world
        )
        return self._loader(dataset, sampler)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """(images, labels) of the validation split."""
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """(images, labels) of the test split, for the final figure."""
        return self._eval_loader("test")

    def look_loader(self) -> tuple[str, DataLoader[tuple[Tensor, Tensor]]]:
        """What a teacher is tried on before it is converted: never test.

        Returns:
            ``validation``, or ``training`` where that has no images, and (images, labels) of it.
        """
        if len(self._items["val"][1]):
            return "validation", self._eval_loader("val")
        split, chosen = self._items["train"]
        known = (self._splits.parts[split].labels[chosen] >= 0).any() if len(chosen) else False
        return "training", self._eval_loader("train", labelled=bool(known))

    def _eval_loader(self, name: str, labelled: bool = False) -> DataLoader[tuple[Tensor, Tensor]]:
        dataset = LabelledImages(*self._images(name, augmented=False, labelled=labelled))
        rank, world = self._place
        return self._loader(
            dataset,
            SequentialBatchSampler(len(dataset), self.config.data.eval_batch_size, rank, world),
        )

    def _loader(self, dataset: Dataset[Any], sampler: Sampler[list[Draw]]) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=self.config.data.workers,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.config.data.workers > 0,
        )

    @property
    def _place(self) -> tuple[int, int]:
        """The process's rank and how many there are."""
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def calibration_batches(self, count: int) -> list[Tensor]:
        """The first `count` unlabelled batches, not augmented; fewer if the images run out."""
        images, _ = self._images("train", augmented=False, count=self.config.data.unlabelled)
        batches = SequentialBatchSampler(len(images), self.config.data.batch_size)
        return [images.__getitems__(draws) for draws in islice(batches, count)]

    def calibration_inputs(self, count: int) -> Tensor:
        """The first `count` of these images as one batch; fewer if the images run out."""
        batches = self.calibration_batches(-(-count // self.config.data.batch_size))
        return torch.cat(batches)[:count]


def _as_it_is(batch: Any) -> Any:
    """The datasets answer with whole batches; nothing is left to collate."""
    return batch


def _share(fraction: float, count: int) -> int:
    """So many of ``count`` images; one at least where there is another for the rest."""
    return max(round(fraction * count), int(fraction > 0 and count > 1))


def _resize(size: int | str | None) -> int | tuple[int, int] | None:
    """`task.data.resize` as `Layout` has it."""
    if size is None:
        return None
    both = sides("task.data.resize", size, low=0)
    return both if "x" in str(size).lower() else both[0]
