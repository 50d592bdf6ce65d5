"""Whether a task's data can be what it reads, before torch loads and a run folder is made."""

from pathlib import Path
from typing import Any

from archnet.errors import TaskError
from archnet.tasks import sources
from archnet.tasks.corpus import TextFiles


def check_data(task: Any, trains_teacher: bool = False) -> None:
    """Look for the files of a task.

    Args:
        task: `task` of the config.
        trains_teacher: whether a teacher learns from its labels first.

    Raises:
        TaskError: `task.data.root` is missing, empty, no folder or not readable, or holds nothing
            that the task can train with.
    """
    data = task.data
    if task.kind == "translation":
        if data.source != "phrases":
            root = Path(data.root).expanduser()
            if root.exists():
                sources.require_folder(root)
            TextFiles.of(root, task.text).check()
        return
    if data.source == "mnist5k" or (data.source == "cifar10" and data.download):
        return  # brought along, or fetched when the run begins
    splits = sources.read(data, task.name)
    where = f"task.data.root={data.root}"
    sources.require_classes(splits, where)
    if "train" not in splits.parts:
        raise TaskError(
            f"{where} has images of {' and '.join(splits.parts)} and leaves none for train: name "
            "the folder above them, or give it a train folder"
        )
    if trains_teacher and (splits.parts["train"].labels == sources.UNLABELLED).all():
        raise TaskError(
            f"teacher.train=true needs labels, and the training images of {where} have none: "
            "teacher.train=false teacher.weights=<file> takes a teacher that is trained"
        )
