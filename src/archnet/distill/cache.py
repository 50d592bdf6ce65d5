"""Features kept on disk, so that a block trains without the network around it."""

import io
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from archnet.distill.schedule import DistillError
from archnet.files import FULL, atomic, remove

_log = logging.getLogger(__name__)


class FeatureCache:
    """Named arrays of half-precision features, one row per image, as memory-mapped files.

    An array appears under its name when it is complete, so that a run that was killed while
    writing finds either all of it or nothing. Its checksum is compared once by every process that
    finds it; a damaged array is as good as none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: set[str] = set()

    def __contains__(self, name: str) -> bool:
        path = self.folder / f"{name}.npy"
        if name in self._known or not os.path.lexists(path):
            return path.is_file()
        try:
            expected = json.loads((self.folder / f"{name}.json").read_text())["crc32"]
            if _checksum(path) != expected:
                raise ValueError("another checksum")
            self.read(name)
        except (OSError, ValueError, LookupError, TypeError) as error:
            _log.warning("%s is damaged (%s) and written again", path, error)
            self.drop(name)
            return False
        self._known.add(name)
        return True

    def write(self, names: Sequence[str], rows: int, batches: Iterable[Sequence[Tensor]]) -> None:
        """Write arrays of ``rows`` rows from batches of one tensor per name.

        Raises:
            DistillError: the disk has no room for them.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob("*.part"):
            left.unlink()
        parts = [self.folder / f"{name}.part" for name in names]
        try:
            checksums = self._fill(parts, rows, batches)
        except OSError as error:
            if error.errno in FULL:
                raise DistillError(self._no_room(f"is full: {error.strerror}")) from error
            raise
        for part, name, checksum in zip(parts, names, checksums, strict=True):
            self.drop(name)
            with atomic(self.folder / f"{name}.json", DistillError) as temporary:
                temporary.write_text(json.dumps({"crc32": checksum}))
            os.replace(part, self.folder / f"{name}.npy")
            self._known.add(name)

    def _fill(
        self, parts: Sequence[Path], rows: int, batches: Iterable[Sequence[Tensor]]
    ) -> list[int]:
        """The checksums of the files that hold the arrays."""
        filled = 0
        checksums = [0] * len(parts)
        with ExitStack() as stack:
            # Not memory-mapped: on a full disk, a write is an error and a store ends the process.
            files = [stack.enter_context(part.open("wb")) for part in parts]
            for batch in batches:
                count = min(len(batch[0]), rows - filled)
                if not filled:
                    shapes = [(rows, *feature.shape[1:]) for feature in batch]
                    self._require_room(sum(2 * int(np.prod(shape)) for shape in shapes))
                for index, feature in enumerate(batch):
                    # Features beyond half precision's range would become infinite.
                    limited = feature[:count].float().clamp(-65504, 65504)
                    content = limited.half().cpu().contiguous().numpy().tobytes()
                    if not filled:
                        content = _header((rows, *feature.shape[1:])) + content
                    files[index].write(content)
                    checksums[index] = zlib.crc32(content, checksums[index])
                filled += count
                if filled == rows:
                    break
        return checksums

    def read(self, name: str) -> np.memmap:
        """(rows, ...) half precision, read only."""
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")

    def drop(self, name: str) -> None:
        """Remove one array, if it is there."""
        for kind in ("npy", "json"):
            remove(self.folder / f"{name}.{kind}")
        self._known.discard(name)

    def clear(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _require_room(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise DistillError(
                self._no_room(f"needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free")
            )

    def _no_room(self, why: str) -> str:
        return (
            f"the disk of {self.folder} has no room for the feature cache of "
            f"distill.schedule=local, which {why}: lower distill.cache_images, or take "
            "distill.schedule=joint"
        )


def _header(shape: tuple[int, ...]) -> bytes:
    """What a file of NumPy begins with."""
    stream = io.BytesIO()
    described = {"descr": "<f2", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, described)
    return stream.getvalue()


def _checksum(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found = zlib.crc32(block, found)
    return found


class CachedRows(Dataset[list[Tensor]]):
    """Rows of several arrays: what a block reads, and what it should give."""

    def __init__(self, source: np.memmap, *targets: np.memmap) -> None:
        self.source, self.targets = source, targets

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, draws: Sequence[tuple[int, int]]) -> list[Tensor]:
        index = np.fromiter((draw[0] for draw in draws), np.int64)
        return [_rows(array, index) for array in (self.source, *self.targets)]


def _rows(array: np.memmap, index: np.ndarray) -> Tensor:
    rows = torch.from_numpy(np.ascontiguousarray(array[index])).float()
    return rows.contiguous(memory_format=torch.channels_last) if rows.dim() == 4 else rows
