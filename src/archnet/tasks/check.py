"""Whether the data of a config can be what its task reads, before torch loads."""

from dataclasses import replace
from pathlib import Path

from archnet.config import Config
from archnet.errors import TaskError
from archnet.tasks import masks, sources
from archnet.tasks.corpus import TextFiles


def check_text(config: Config) -> None:
    """Look for the files of a translation task.

    Raises:
        TaskError: `task.data.root` is missing, empty, no folder or not readable, or lacks a file.
    """
    data = config.task.data
    if data.source == "phrases" or data.root is None:
        return
    root = Path(data.root).expanduser()
    if root.exists():
        sources.require_folder(root)
    TextFiles.of(root, config.task.text).check()


def check_images(config: Config) -> None:
    """Look for the images of a classifier, and for their labels where its teacher is trained.

    Raises:
        TaskError: `task.data.root` is missing, empty, no folder or not readable, or holds nothing
            that the task can train with.
    """
    data = config.task.data
    if data.source == "mnist5k" or (data.source == "cifar10" and data.download):
        return  # brought along, or fetched when the run begins
    splits = sources.read(data, config.task.name)
    where = f"task.data.root={data.root}"
    sources.require_classes(splits, where)
    if "train" not in splits.parts:
        raise TaskError(
            f"{where} has images of {' and '.join(splits.parts)} and leaves none for train: name "
            "the folder above them, or give it a train folder"
        )
    if config.teacher.train and (splits.parts["train"].labels == sources.UNLABELLED).all():
        raise TaskError(
            f"teacher.train=true needs labels, and the training images of {where} have none: "
            "teacher.train=false teacher.weights=<file> takes a teacher that is trained"
        )


def check_masks(config: Config) -> None:
    """Look for images and their masks.

    Raises:
        TaskError: as of `check_images`.
    """
    if config.task.data.source == "scenes":
        return  # made here
    splits = masks.read(config.task.data, config.task.name)
    if "train" not in splits.parts:
        raise TaskError(
            f"task.data.root={config.task.data.root} has images of {' and '.join(splits.parts)} "
            "and leaves none for train: name the folder above them, or give it a train folder"
        )
    if config.teacher.train and (splits.parts["train"].labels == sources.UNLABELLED).all():
        raise TaskError(
            "teacher.train=true needs masks of the training images, and they have none: "
            "teacher.train=false teacher.weights=<file> takes a teacher that is trained"
        )


def check_features(config: Config) -> None:
    """Look for images whose labels say nothing; a datamodule is looked at when it is made."""
    if config.task.datamodule is None:
        data = replace(config.task.data, labels="ignore")
        check_images(replace(config, task=replace(config.task, data=data)))
