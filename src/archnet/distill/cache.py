"""Features kept on disk, so that a block trains without the network around it."""

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from archnet.distill.schedule import DistillError


class FeatureCache:
    """Named arrays of half-precision features, one row per image, as memory-mapped files.

    An array appears under its name when it is complete, so that a run that was killed while
    writing finds either all of it or nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __contains__(self, name: str) -> bool:
        return (self.folder / f"{name}.npy").is_file()

    def write(self, names: Sequence[str], rows: int, batches: Iterable[Sequence[Tensor]]) -> None:
        """Write arrays of ``rows`` rows from batches of one tensor per name.

        Raises:
            DistillError: the disk has no room for them.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        arrays: list[np.memmap] = []
        parts = [self.folder / f"{name}.part" for name in names]
        filled = 0
        for batch in batches:
            if not arrays:
                shapes = [(rows, *feature.shape[1:]) for feature in batch]
                self._require_room(sum(2 * int(np.prod(shape)) for shape in shapes))
                arrays = [
                    np.lib.format.open_memmap(part, "w+", np.float16, shape)
                    for part, shape in zip(parts, shapes, strict=True)
                ]
            count = min(len(batch[0]), rows - filled)
            for array, feature in zip(arrays, batch, strict=True):
                # Features beyond half precision's range would become infinite.
                limited = feature[:count].float().clamp(-65504, 65504)
                array[filled : filled + count] = limited.half().cpu().numpy()
            filled += count
            if filled == rows:
                break
        for array, part, name in zip(arrays, parts, names, strict=True):
            array.flush()
            os.replace(part, self.folder / f"{name}.npy")

    def read(self, name: str) -> np.memmap:
        """(rows, ...) half precision, read only."""
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")

    def drop(self, name: str) -> None:
        """Remove one array, if it is there."""
        (self.folder / f"{name}.npy").unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _require_room(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise DistillError(
                f"the feature cache of distill.schedule=local needs {needed / 1e9:.1f} GB in "
                f"{self.folder} and {free / 1e9:.1f} GB are free: lower distill.cache_images, "
                "or take distill.schedule=joint"
            )


class CachedPairs(Dataset[tuple[Tensor, Tensor]]):
    """Rows of two arrays: what a block reads, and what it should give."""

    def __init__(self, source: np.memmap, target: np.memmap) -> None:
        self.source, self.target = source, target

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, draws: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        index = np.fromiter((draw[0] for draw in draws), np.int64)
        return _rows(self.source, index), _rows(self.target, index)


def _rows(array: np.memmap, index: np.ndarray) -> Tensor:
    rows = torch.from_numpy(np.ascontiguousarray(array[index])).float()
    return rows.contiguous(memory_format=torch.channels_last) if rows.dim() == 4 else rows
