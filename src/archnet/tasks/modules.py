"""A `LightningDataModule` of the user's own as the data of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from archnet.errors import TaskError
from archnet.loaders import LabelledBatch, Takes
from archnet.plugins import current_folder, first_line, imported
from archnet.tasks.sampling import Draw, SequentialBatchSampler, StepBatchSampler


class ModuleData:
    """What a run needs of its data, out of a datamodule's loaders.

    Training draws from the dataset of `train_dataloader` by step, as it does from archnet's own, so
    that a resumed run sees what an unbroken one does; the loader's collate function makes its
    batches. Labels are dropped there. `val_dataloader` is looked at while training, and
    `test_dataloader` gives the final figures; their loaders are read as they are.

    Args:
        config: `task` of the config, with `datamodule`.
        seed: of the order of training.

    Raises:
        TaskError: the module cannot be made, lacks a loader, or gives no batches of one tensor.
    """

    def __init__(self, config: Any, seed: int) -> None:
        self.config, self.seed = config, seed
        self._key = f"task.datamodule={config.datamodule}"
        made = imported(config.datamodule, "task.datamodule", TaskError)
        with current_folder():
            try:
                self.module = made(**config.datamodule_kwargs)
            except Exception as error:  # whatever code of others raises
                raise TaskError(f"{self._key} cannot be made: {first_line(error)}") from error
        if not isinstance(self.module, lightning.LightningDataModule):
            raise TaskError(
                f"{self._key} is a {type(self.module).__name__}, not a LightningDataModule"
            )
        self._asked("prepare_data", self.module.prepare_data)
        self._asked("setup", lambda: self.module.setup("fit"))
        self._asked("setup", lambda: self.module.setup("test"))
        self._dataset = _Unlabelled(self._drawn_from(), self._key)
        self.takes = self._dataset.takes
        for split in ("val", "test"):  # asked now, not after training
            self._loader(split)

    def _asked(self, name: str, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except TaskError:
            raise
        except Exception as error:  # whatever code of others raises; Lightning's where it is absent
            raise TaskError(f"{self._key}: its {name} fails: {first_line(error)}") from error

    def _loader(self, split: str) -> Any:
        name = f"{split}_dataloader"
        if getattr(type(self.module), name) is getattr(lightning.LightningDataModule, name):
            raise TaskError(
                f"{self._key} has no {name}: archnet trains with train_dataloader, without labels, "
                "looks at val_dataloader on the way and measures on test_dataloader"
            )
        return self._asked(name, getattr(self.module, name))

    def _drawn_from(self) -> DataLoader[Any]:
        """The training part's loader, whose dataset gives samples by number."""
        loader = self._loader("train")
        is_drawn_from = isinstance(loader, DataLoader) and hasattr(loader.dataset, "__getitem__")
        if not is_drawn_from or isinstance(loader.dataset, IterableDataset):
            raise TaskError(
                f"{self._key}: train_dataloader gives a {type(loader).__name__} that cannot be "
                "drawn from by number: give a DataLoader of a dataset with __getitem__ and __len__"
            )
        if not len(loader.dataset):
            raise TaskError(f"{self._key}: the dataset of train_dataloader is empty")
        return loader

    def unlabelled(self) -> Dataset[Tensor]:
        """The inputs of the training part, without labels."""
        return self._dataset

    def step_loader(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        steps: int,
        *,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> DataLoader[Any]:
        """Batches `start` to `steps` - 1, as `StepBatchSampler` says."""
        size = len(dataset)  # type: ignore[arg-type]
        sampler = StepBatchSampler(
            size, batch_size, steps, self.seed, start=start, rank=rank, world=world
        )
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=self.config.data.workers,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.config.data.workers > 0,
        )

    def val_dataloader(self) -> Batches:
        """Inputs, and labels where they are classes; else -1 for every input."""
        return Batches(self._loader("val"), self.takes, f"{self._key}: val_dataloader", True)

    def test_dataloader(self) -> Batches:
        """Inputs and labels as they are; None where there are none."""
        return Batches(self._loader("test"), self.takes, f"{self._key}: test_dataloader", False)

    def calibration_batches(self, count: int) -> list[Tensor]:
        """The first ``count`` batches of the training part; fewer if it runs out."""
        batches = SequentialBatchSampler(len(self._dataset), self.config.data.batch_size)
        return [self._dataset.__getitems__(draws) for draws in islice(batches, count)]

    def calibration_inputs(self, count: int) -> Tensor:
        """The first ``count`` of these inputs as one batch; fewer if they run out."""
        return torch.cat(self.calibration_batches(-(-count // self.config.data.batch_size)))[:count]


class Batches:
    """A loader's batches as (inputs, labels)."""

    def __init__(self, loader: Any, takes: Takes, name: str, classes_only: bool) -> None:
        self.loader, self.takes, self.name, self.classes_only = loader, takes, name, classes_only

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        index = -1
        for index, given in enumerate(self.loader):
            batch = self.takes.batch(given, f"batch {index} of {self.name}", TaskError)
            yield self._pair(batch)
        if index < 0:
            raise TaskError(f"{self.name} gives no batch")

    def _pair(self, batch: LabelledBatch) -> tuple[Tensor, Any]:
        (inputs,), labels = batch.inputs, batch.labels
        is_class = isinstance(labels, Tensor) and not labels.is_floating_point()
        if self.classes_only and not (is_class and labels.shape[:1] == inputs.shape[:1]):
            labels = torch.full((len(inputs),), -1)
        return inputs, labels


class _Unlabelled(Dataset[Tensor]):
    """The inputs of a loader's dataset, in batches that its collate function makes."""

    def __init__(self, loader: DataLoader[Any], key: str) -> None:
        self.dataset = loader.dataset
        self.collate = loader.collate_fn or default_collate
        self.name = f"a batch of {key}: train_dataloader"
        # The first sample says what an input is.
        self.takes = Takes({"input": _shape_of(self.collate([self.dataset[0]]), self.name)})

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, draw: Draw) -> Tensor:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: Sequence[Draw]) -> Tensor:
        given = self.collate([self.dataset[draw.item] for draw in draws])
        (inputs,) = self.takes.batch(given, self.name, TaskError).inputs
        return inputs


def _shape_of(given: Any, name: str) -> tuple[int, ...]:
    """The shape of one sample of the first tensor in a batch."""
    first = given
    while isinstance(first, Mapping | tuple | list) and first:
        values = list(first.values()) if isinstance(first, Mapping) else first
        first = next((x for x in values if isinstance(x, Tensor)), values[0])
    if not isinstance(first, Tensor) or not first.dim():
        raise TaskError(f"{name} is a {type(given).__name__} without a tensor (B, ...) of inputs")
    return tuple(first.shape[1:])


def _as_it_is(batch: Any) -> Any:
    """The dataset answers with whole batches; nothing is left to collate."""
    return batch
